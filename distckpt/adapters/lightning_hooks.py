"""What the callbacks for Lightning do: the state of a `Trainer` as distckpt's state, and when it is saved and restored.

Lightning's own dump and restore of what is not a tensor are used as they are, so that each version's loops and plugins
come back as that version wants them; distckpt keeps modules, optimizers and schedulers itself.
Invariant: a step is given to the manager once, when nothing that Lightning does for this step is left to be done.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader

from distckpt.errors import UsageError
from distckpt.manager import CheckpointManager
from distckpt.rng import RandomState
from distckpt.slots import PerRank

logger = logging.getLogger("distckpt")

STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")  # each rank has the whole module, and no state elsewhere
_OWN_KEYS = ("state_dict", "optimizer_states", "lr_schedulers")
_HYPER_PARAMETERS = ("hyper_parameters", "hparams_name", "hparams_type", "datamodule_hyper_parameters")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """What a resumed training is still to be given once Lightning has made its loaders."""

    random: dict[str, Any]
    metrics: dict[str, Any]
    loaders: list[Any]
    between_epochs: bool


class LightningHooks:
    """The hooks of a Lightning callback; `DistckptCallback` of either package adds the base class.

    Args:
        checkpoints: The manager; one for each `fit`.
    """

    leaving: type[BaseException]  # what Lightning takes as the wish to return from `fit` at once
    best_model_path = ""  # what `ckpt_path="best"` asks for: there is no such file

    def __init__(self, checkpoints: CheckpointManager) -> None:
        super().__init__()
        self._checkpoints = checkpoints
        self._step = 0  # the last one that the manager knows
        self._begun: _Begun | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the newest checkpoint; Lightning then goes on as if it had read a file of its own.

        Ranks: all (collective).
        """
        strategy = type(trainer.strategy).__name__
        if strategy not in STRATEGIES:
            raise UsageError(
                problem=f"DistckptCallback does not know how the strategy {strategy} keeps its state",
                fix='Trainer(strategy="ddp"), or a loop of your own: distckpt saves FSDP2 modules as they are',
            )
        before = {each: signal.getsignal(each) for each in signal.Signals if each not in _NOT_TO_HANDLE}
        rest, loaders = TrainerRest(trainer, ended=False), PerRank(LoaderStates(trainer))
        self._step = self._checkpoints.restore(_state(trainer, pl_module, rest, loaders))
        self._handlers = {each: new for each, old in before.items() if (new := signal.getsignal(each)) is not old}
        for each in self._handlers:  # until Lightning has put its own there, and knows what to put back at the end
            signal.signal(each, before[each])
        if not self._step:
            return
        self._begun = _Begun(
            random=RandomState().state_dict(),
            metrics=rest.loaded["metrics"],
            loaders=loaders.value.loaded,
            between_epochs=rest.loaded["ended"],
        )
        connector = trainer._checkpoint_connector
        connector._loaded_checkpoint = rest.as_loaded(pl_module, self._begun.loaders)
        connector.restore_datamodule()
        connector.restore_model()
        connector.restore_callbacks()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signals from Lightning's handlers, and set what beginning has used up.

        Lightning's handler of SIGTERM broadcasts from inside the handler, which ranks that got no signal never join.

        Ranks: all.
        """
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        _check_samplers(trainer.fit_loop)
        begun, self._begun = self._begun, None
        if begun is None:
            return
        trainer._logger_connector._callback_metrics.update(begun.metrics)
        fit_loop = trainer.fit_loop
        if begun.between_epochs:  # a new epoch begins, as in a run that nobody stopped: there is nothing to catch up on
            fit_loop._restarting = fit_loop.epoch_loop.restarting = False
            _finish_loaders(fit_loop, begun.loaders)
            RandomState().load_state_dict(begun.random)
            if fit_loop._data_fetcher is not None:
                iter(fit_loop._data_fetcher)
            return
        if begun.loaders:  # iterators were made before samplers knew the epoch, which their order depends on
            _begin_loaders_again(fit_loop, begun.loaders)
        RandomState().load_state_dict(begun.random)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Give the step to the manager, unless Lightning has something left to do for it.

        Ranks: all (collective).
        """
        loop = trainer.fit_loop.epoch_loop
        if trainer.global_step == self._step:  # gradients are being accumulated
            return
        is_last = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        if not trainer.is_last_batch and not is_last and loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            return
        if trainer.is_last_batch and not is_last:
            return
        self._complete(trainer, pl_module, ended=False, is_last=is_last)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Give the step to the manager that this validation, in the middle of an epoch, belongs to.

        Ranks: all (collective).
        """
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._complete(trainer, pl_module, ended=False)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the last step of the epoch before to the manager: now all that belongs to it is done.

        Ranks: all (collective).
        """
        self._complete(trainer, pl_module, ended=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last step, if nothing has, and wait until it is committed.

        Ranks: all (collective).
        """
        self._complete(trainer, pl_module, ended=trainer.is_last_batch, is_last=True)
        self._checkpoints.wait()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the manager, which gives the save in flight its chance, and hides no error.

        Ranks: any.
        """
        trace: TracebackType | None = exception.__traceback__
        self._checkpoints.__exit__(type(exception), exception, trace)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the manager.

        Ranks: any.
        """
        if stage == "fit":
            self._checkpoints.close()

    def _complete(self, trainer: Any, pl_module: Any, *, ended: bool, is_last: bool = False) -> None:
        """Give a completed step to the manager, once; after a signal, leave `fit`."""
        step, is_new = trainer.global_step, trainer.global_step != self._step
        if not (is_new or is_last):
            return
        self._step = step
        state = _state(trainer, pl_module, TrainerRest(trainer, ended=ended), PerRank(LoaderStates(trainer)))
        metrics = Metrics(trainer)
        if is_new and self._checkpoints.step(step, state, metrics=metrics):
            # Lightning's own way to return from `fit` with no more hooks, validation or `min_epochs`: there is no time.
            raise self.leaving
        if is_last:
            self._checkpoints.save(step, state, metrics=metrics)


class TrainerRest:
    """What Lightning itself would save, less what distckpt keeps as objects.

    Args:
        trainer: The trainer.
        ended: Whether the epoch is over, with its hooks and validation; else there are batches of it left.

    Attributes:
        loaded: What the checkpoint holds.
    """

    def __init__(self, trainer: Any, *, ended: bool) -> None:
        self.loaded: dict[str, Any] = {}
        self._trainer = trainer
        self._ended = ended

    def state_dict(self) -> dict[str, Any]:
        """Return it, as Lightning dumps it now.

        Ranks: all (Lightning's hooks may be collective).
        """
        dumped = self._trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        known = self._trainer.lightning_module.state_dict().keys()
        extra = {name: value for name, value in dumped["state_dict"].items() if name not in known}
        rest = {name: value for name, value in dumped.items() if name not in (*_OWN_KEYS, *_HYPER_PARAMETERS)}
        fit_loop = dict(rest["loops"]["fit_loop"])
        fit_loop["state_dict"] = {k: v for k, v in fit_loop["state_dict"].items() if k != "combined_loader"}
        fit_loop["epoch_progress"] = {k: _at_rest(v, self._ended) for k, v in fit_loop["epoch_progress"].items()}
        rest["loops"] = {**rest["loops"], "fit_loop": fit_loop}
        metrics = {name: value.detach().clone() for name, value in self._trainer.callback_metrics.items()}
        return {"lightning": rest, "extra": extra, "metrics": metrics, "ended": self._ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep what was saved, for `as_loaded`.

        Ranks: any.
        """
        self.loaded = state

    def as_loaded(self, pl_module: Any, loaders: list[Any]) -> dict[str, Any]:
        """Return what Lightning would have read from a file of its own, with the objects as they are now.

        Ranks: any.
        """
        trainer, rest = self._trainer, self.loaded["lightning"]
        rest["loops"]["fit_loop"]["state_dict"]["combined_loader"] = loaders
        return {
            **rest,
            "state_dict": {**pl_module.state_dict(), **self.loaded["extra"]},
            "optimizer_states": [each.state_dict() for each in trainer.optimizers],
            "lr_schedulers": [each.scheduler.state_dict() for each in trainer.lr_scheduler_configs],
        }


class LoaderStates:
    """The positions of this rank's training loaders, those of them that have one.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.loaded: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the loaders' states, in their order.

        Ranks: any.
        """
        combined = self._trainer.fit_loop._combined_loader
        return {"loaders": [] if combined is None else combined._state_dicts()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep them; the loaders are made later.

        Ranks: any.
        """
        self.loaded = state["loaders"]


class Metrics(Mapping[str, float]):
    """What was logged, read only when a save is due: reading a metric waits for the GPU.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __getitem__(self, name: str) -> float:
        return float(self._trainer.callback_metrics[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._trainer.callback_metrics)

    def __len__(self) -> int:
        return len(self._trainer.callback_metrics)


_NOT_TO_HANDLE = (signal.SIGKILL, signal.SIGSTOP)


def _state(trainer: Any, pl_module: Any, rest: TrainerRest, loaders: PerRank[LoaderStates]) -> dict[str, Any]:
    return {
        "model": pl_module,
        "optimizers": list(trainer.optimizers),
        "schedulers": [each.scheduler for each in trainer.lr_scheduler_configs],
        "trainer": rest,
        "loaders": loaders,
    }


def _at_rest(progress: dict[str, int], ended: bool) -> dict[str, int]:
    """Return the count of epochs as it is between two of them, or inside one, whichever hook it is seen from."""
    if ended:
        return dict.fromkeys(progress, progress["processed"])
    return {**progress, "processed": progress["started"] - 1, "completed": progress["started"] - 1}


def _check_samplers(fit_loop: Any) -> None:
    """Warn of an order that a resumed run cannot find again: Lightning's wrapper hides the sampler from its loader."""
    loaders = [] if fit_loop._combined_loader is None else fit_loop._combined_loader.flattened
    for loader in loaders:
        kinds = {type(sampler).__name__ for sampler in _samplers(loader)}
        if hasattr(loader, "state_dict") and "DistributedSamplerWrapper" in kinds:
            logger.warning(
                "a run resumed inside an epoch will see samples twice, and others not at all: the order of a %s's "
                "sampler cannot be saved through the one that Lightning has put around it. "
                "Fix: StatefulDataLoader(..., sampler=torch.utils.data.DistributedSampler(dataset))",
                type(loader).__name__,
            )


def _samplers(loader: Any) -> list[Any]:
    """Return the places where a loader may have its sampler."""
    return [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]


def _begin_loaders_again(fit_loop: Any, states: list[Any]) -> None:
    """Set the epoch of the samplers, then the positions in its order."""
    for loader in fit_loop._combined_loader.flattened:
        for sampler in _samplers(loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(fit_loop.epoch_progress.current.processed)
    fit_loop._combined_loader._load_state_dicts(states)
    iter(fit_loop._data_fetcher)


def _finish_loaders(fit_loop: Any, states: list[Any]) -> None:
    """Bring loaders that were read to their end, but not asked for more, over it: their samplers still stand there."""
    fit_loop._combined_loader._load_state_dicts(states)
    for loader in fit_loop._combined_loader.flattened:
        if isinstance(loader, DataLoader) and hasattr(loader, "load_state_dict"):
            next(iter(loader), None)
