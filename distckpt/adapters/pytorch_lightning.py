"""Lightning, as the package `pytorch_lightning`: a callback that saves and restores through a CheckpointManager."""

from __future__ import annotations

from distckpt.adapters.lightning_hooks import LightningHooks
from distckpt.errors import DependencyError

try:
    from pytorch_lightning.callbacks import Checkpoint
    from pytorch_lightning.utilities.exceptions import _TunerExitException
except ModuleNotFoundError as error:
    raise DependencyError(
        package="pytorch-lightning",
        purpose="distckpt.adapters.pytorch_lightning",
        fix="pip install pytorch-lightning",
    ) from error

__all__ = ["DistckptCallback"]


class DistckptCallback(LightningHooks, Checkpoint):
    """The same as `distckpt.adapters.lightning.DistckptCallback`, for a `pytorch_lightning.Trainer`.

    The two packages' classes do not know each other: take the one whose `Trainer` you use.

    Args:
        checkpoints: The manager; one for each `fit`.

    Ranks: all; what its hooks raise and wait for is what `CheckpointManager.restore`, `step` and `close` do.
    """

    leaving = _TunerExitException
