"""Lightning, as the package `lightning`: a callback that saves and restores through a CheckpointManager."""

from __future__ import annotations

from distckpt.adapters.lightning_hooks import LightningHooks
from distckpt.errors import DependencyError

try:
    from lightning.pytorch.callbacks import Checkpoint
    from lightning.pytorch.utilities.exceptions import _TunerExitException
except ModuleNotFoundError as error:
    raise DependencyError(
        package="lightning", purpose="distckpt.adapters.lightning", fix="pip install 'distckpt[lightning]'"
    ) from error

__all__ = ["DistckptCallback"]


class DistckptCallback(LightningHooks, Checkpoint):
    """Makes a Lightning `Trainer` save and resume through distckpt, in place of `ModelCheckpoint`.

        checkpoints = distckpt.CheckpointManager("runs/first", every=50, keep=3)
        trainer = lightning.Trainer(max_steps=1000, callbacks=[DistckptCallback(checkpoints)])
        trainer.fit(model, loader)

    `fit` resumes from the newest good checkpoint by itself. Saved are the module, optimizers, schedulers, the
    precision plugin's scaler, loops, callbacks, the data module, what `on_save_checkpoint` adds, the position of
    loaders that have `state_dict` (torchdata's `StatefulDataLoader`), and each rank's random-number generators; not
    the hyper-parameters, which the code states (`CheckpointManager(config=...)` keeps them for the eye).

    A checkpoint's step is Lightning's `global_step`. A step that ends an epoch, or is followed by a validation, is
    saved after it, so that callbacks have seen its result. On a signal the step is saved and `fit` returns at once,
    without another hook or validation; `checkpoints.preempted` is then true. The manager is closed when `fit` ends.

    Args:
        checkpoints: The manager; one for each `fit`.

    Raises:
        UsageError: In `fit`: the strategy is not single-device or DDP.

    Ranks: all; what its hooks raise and wait for is what `CheckpointManager.restore`, `step` and `close` do.
    """

    leaving = _TunerExitException
