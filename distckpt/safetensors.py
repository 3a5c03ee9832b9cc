"""The safetensors file format: its header, made and parsed, and the dtypes that distckpt stores.

A file is 8 bytes (the header's length, little endian), a JSON header, and the tensors' bytes one after another.
The header is padded with spaces so that the tensors' bytes begin at a multiple of `ALIGNMENT`.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass

ALIGNMENT = 4096  # bytes; the block size of direct I/O on common disks
MAX_HEADER_BYTES = 100_000_000  # the limit that the format's own readers set

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
    "C128": 16,
}
# Older readers know no complex numbers: a file holds them as pairs, in a last dimension of size 2.
PAIRS = {"C64": "F32", "C128": "F64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor in a file, in the order in which it is stored.

    Attributes:
        name: Its name in the file.
        dtype: A key of `ITEM_BYTES`.
        shape: Its shape; () for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The tensor's size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def make_header(pieces: Iterable[Piece], *, metadata: dict[str, str] | None = None) -> bytes:
    """Return a file's first bytes, up to where the first tensor's bytes begin: a multiple of `ALIGNMENT`."""
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = metadata
    begin = 0
    for piece in pieces:
        end = begin + piece.num_bytes
        pair = PAIRS.get(piece.dtype)
        table[piece.name] = {
            "dtype": pair or piece.dtype,
            "shape": [*piece.shape, 2] if pair else list(piece.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
