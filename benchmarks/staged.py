"""How many bytes a library copies through torch, whatever library it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes of every tensor in host memory that this thread fills by a copy through torch.

    Attributes:
        num_bytes: How many so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let the operation happen, and count what it copied."""
        result = func(*args, **(kwargs or {}))
        match getattr(func, "_schema").name:  # noqa: B009  an operator's, which has no public name
            case "aten::copy_":
                self._count(args[0])
            case "aten::_foreach_copy_":
                self._count(*args[0])
            case "aten::clone" | "aten::_to_copy":
                self._count(result)
        return result

    def _count(self, *filled: torch.Tensor) -> None:
        self.num_bytes += sum(each.nbytes for each in filled if each.device.type == "cpu")
