"""Python's cyclic garbage collector, kept from running while a great many small objects are made.

It would walk over all of them again and again, and find nothing: they hold no cycles.
Source: a save of 20,000 tensors took 0.3 s of CPU time without it and 0.9 s with it, a load 0.6 s and 1.3 s; importing
torch and torchvision 1.5 s and 2.0 s.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_holders = 0
_was_enabled = False


@contextmanager
def kept_off() -> Iterator[None]:
    """Keep the collector off while the context lasts, on any thread; afterwards it is as the user had it."""
    global _holders, _was_enabled  # noqa: PLW0603  the collector is one for the whole process
    with _lock:
        if _holders == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and _was_enabled:
                gc.enable()
