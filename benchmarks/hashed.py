"""How many bytes xxh3 is given, whoever gives them; and distckpt with a digest that looks at nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import xxhash

from distckpt import checksum

_AT_ONCE = ("xxh3_128_hexdigest", "xxh3_128_digest", "xxh3_128_intdigest", "xxh3_64_hexdigest", "xxh3_64_intdigest")
_IN_PARTS = ("xxh3_128", "xxh3_64")


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Give the sizes of everything that xxh3 is given meanwhile, on any thread of this process."""
    sizes: list[int] = []
    real = {name: getattr(xxhash, name) for name in (*_AT_ONCE, *_IN_PARTS)}

    def at_once(name: str) -> Any:
        def digest(data: Any, *arguments: Any, **settings: Any) -> Any:
            sizes.append(memoryview(data).nbytes)
            return real[name](data, *arguments, **settings)

        return digest

    def in_parts(name: str) -> Any:
        class Counted:
            def __init__(self, data: Any = b"", **settings: Any) -> None:
                sizes.append(memoryview(data).nbytes)
                self._real = real[name](data, **settings)

            def update(self, data: Any) -> None:
                sizes.append(memoryview(data).nbytes)
                self._real.update(data)

            def __getattr__(self, attribute: str) -> Any:
                return getattr(self._real, attribute)

        return Counted

    try:
        for name in _AT_ONCE:
            setattr(xxhash, name, at_once(name))
        for name in _IN_PARTS:
            setattr(xxhash, name, in_parts(name))
        yield sizes
    finally:
        for name, function in real.items():
            setattr(xxhash, name, function)


@contextlib.contextmanager
def without_digests() -> Iterator[int]:
    """Let distckpt write and read with a digest that looks at nothing, and so always agrees.

    Gives the number of modules in which it was put in the place of the real one.
    """
    real, running = checksum.digest, checksum.Running
    places = [
        (module, name)
        for module in list(sys.modules.values())
        if module is not None and getattr(module, "__name__", "").startswith("distckpt")
        for name, value in list(vars(module).items())
        if value is real
    ]
    try:
        for module, name in places:
            setattr(module, name, lambda *parts: "0" * 32)
        running.add, add = lambda self, part: None, running.add  # type: ignore[method-assign]
        running.digest, text = lambda self: "0" * 32, running.digest  # type: ignore[method-assign]
        yield len(places)
    finally:
        running.add, running.digest = add, text  # type: ignore[method-assign]
        for module, name in places:
            setattr(module, name, real)
