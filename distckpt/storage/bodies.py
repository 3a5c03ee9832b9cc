"""What travels: request bodies that are sent from the caller's memory, answers that are received into it.

Imported only where S3 is used, for it imports aiohttp.
Source: handed over as one file or as bytes, a part is copied once or twice by botocore and aiohttp; written to the
connection in views of this size, the kernel takes nearly all of it from the caller's own memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import Payload
from aiohttp.abc import AbstractStreamWriter

from distckpt.storage.parts import Part, between

WRITE_BYTES = 256 << 10


class PartBody(Payload):
    """A part as aiohttp sends it and botocore accepts it: with a length, and `read` for those who must see the bytes.

    botocore reads a body only to hash it, where the user asks for signed payloads.
    """

    _autoclose = True

    def __init__(self, part: Part) -> None:
        super().__init__(part, content_type="application/octet-stream")
        self._part = part
        self._size = part.num_bytes
        self._place = 0

    def __len__(self) -> int:
        return self._part.num_bytes

    def read(self, num_bytes: int | None = -1) -> bytes:
        """Return a copy of the next bytes."""
        end = len(self) if num_bytes is None or num_bytes < 0 else min(len(self), self._place + num_bytes)
        data = b"".join(between(self._part.views, self._place, end))
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place, as files do."""
        self._place = offset + (0, self._place, len(self))[whence]
        return self._place

    def tell(self) -> int:
        """Return the place."""
        return self._place

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the bytes as text, which nobody needs."""
        return self._part.joined().decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """Send the part."""
        for view in self._part.views:
            for start in range(0, len(view), WRITE_BYTES):
                await writer.write(view[start : start + WRITE_BYTES])

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Send the part, which is as long as its headers say."""
        await self.write(writer)


async def receive(body: Any, into: Sequence[memoryview], count: Callable[[int], None]) -> int:
    """Fill the views of `into` from an answer's body, and return how many bytes came: fewer only if the body ended.

    `count` is told how many bytes have come, each time some have; so they are known if the connection breaks.

    Raises:
        ValueError: More came than fits.
    """
    content: Any = getattr(getattr(body, "raw_stream", None), "content", None)
    has_pieces = hasattr(content, "readchunk")  # as they came from the socket, not joined; not so with httpx
    waiting = deque(into)
    room = memoryview(b"")
    num_come = 0
    while True:
        if has_pieces:
            piece, ends_chunk = await content.readchunk()
            if not piece and ends_chunk:
                continue
        else:
            piece = await body.read(1 << 20)
        if not piece:
            return num_come
        left = memoryview(piece)
        while left:
            if not room:
                if not waiting:
                    raise ValueError("the server sent more than it was asked for")
                room = waiting.popleft()
                continue
            fitting = min(len(room), len(left))
            room[:fitting] = left[:fitting]
            room, left = room[fitting:], left[fitting:]
        num_come += len(piece)
        count(len(piece))
