"""Every exception that distckpt raises, as one tree under `DistckptError`.

Each class is also the builtin that a user already catches.
Facts are keyword arguments and attributes, plain enough to travel as JSON, so that an error met on one rank can be
raised, with the same type and message, on all of them.
"""

from __future__ import annotations

import errno
import time

from distckpt.failure import SHOWN_PROBLEMS, DistckptError, listed, numbered

__all__ = [
    "CheckpointDamagedError",
    "CheckpointExistsError",
    "CheckpointNotFoundError",
    "ConfigError",
    "DependencyError",
    "DirectoryBusyError",
    "DistckptError",
    "FormatVersionError",
    "NonFiniteStateError",
    "RankFailedError",
    "RankTimeoutError",
    "SaveInFlightError",
    "StateDivergedError",
    "StateLoadError",
    "StateMismatchError",
    "StorageError",
    "StorageFullError",
    "UnsafeFileError",
    "UnsupportedStateError",
    "UsageError",
]


class ConfigError(DistckptError, ValueError):
    """A setting is unknown, of the wrong type or out of range.

    Attributes:
        source: Where the setting came from: a file's path, "command line", or the name of the argument.
        problem: What is wrong with it.
    """

    source: str
    problem: str

    def __init__(self, *, source: str, problem: str, fix: str | None = None) -> None:
        self._tell(f"{source}: {problem}", fix=fix, source=source, problem=problem)


class UsageError(DistckptError, ValueError):
    """A call that makes no sense in this place, such as a save on a closed manager.

    Attributes:
        problem: What is wrong with the call.
    """

    problem: str

    def __init__(self, *, problem: str, fix: str | None = None) -> None:
        self._tell(problem, fix=fix, problem=problem)


class DependencyError(DistckptError, ImportError):
    """A package that this call needs is not installed.

    Attributes:
        package: The package's name for pip.
        purpose: What needs it.
    """

    package: str
    purpose: str

    def __init__(self, *, package: str, purpose: str, fix: str | None = None) -> None:
        self._tell(
            f"{purpose} needs the package {package!r}, which is not installed",
            fix=fix or f"pip install {package}",
            package=package,
            purpose=purpose,
        )


class StorageError(DistckptError, OSError):
    """A storage operation failed.

    Attributes:
        path: The file or directory, as a path or URL.
        action: What was tried, as a verb: "write", "read", "list", ...
        cause: The system's or server's own words.
        errno: The system's error number, or None.
    """

    path: str
    action: str
    cause: str

    def __init__(self, *, path: str, action: str, cause: str, errno: int | None = None, fix: str | None = None) -> None:
        message = f"could not {action} {path!r}: {cause}"
        self._tell(message, fix=fix, path=path, action=action, cause=cause, errno=errno)

    def of_rank(self, rank: int, host: str) -> StorageError:
        """Return this error as one that a rank has met."""
        return StorageError(**{**self.facts, "cause": f"{self.cause}; met by rank {rank} (host {host})"})


class StorageFullError(StorageError):
    """A checkpoint does not fit into what a file system has left; the save was not begun.

    Attributes:
        step: The step that was to be saved.
        needed_bytes: What the ranks that share the file system would write there, at least.
        free_bytes: What it has left for this user.
        ranks: Those ranks.
    """

    step: int
    needed_bytes: int
    free_bytes: int
    ranks: list[int]

    def __init__(
        self, *, path: str, step: int, needed_bytes: int, free_bytes: int, ranks: list[int], fix: str | None = None
    ) -> None:
        cause = f"no room: {numbered('rank', ranks)} would write {needed_bytes:,} bytes there, {free_bytes:,} are free"
        message = f"save of step {step} not begun: {cause}, in {path!r}"
        sizes = {"needed_bytes": needed_bytes, "free_bytes": free_bytes}
        self._tell(message, fix=fix, path=path, step=step, ranks=ranks, **sizes)
        self.action, self.cause, self.errno = "write", cause, errno.ENOSPC
        self.rank, self.host = None, None

    def of_rank(self, rank: int, host: str) -> StorageFullError:
        """Return this error as it is: it names its ranks."""
        return self


class CheckpointExistsError(DistckptError, FileExistsError):
    """Another writer has committed this checkpoint already; what is committed is never replaced.

    Attributes:
        path: The manifest's path.
        found: Who wrote the one that is there, as far as it is known.
    """

    path: str
    found: str

    def __init__(self, *, path: str, found: str, fix: str | None = None) -> None:
        message = f"{path!r} exists already ({found}); a committed checkpoint is never overwritten"
        advice = "save another step, or give this job a directory of its own"
        self._tell(message, fix=fix or advice, path=path, found=found)


class CheckpointNotFoundError(DistckptError, FileNotFoundError):
    """There is no committed checkpoint where one is needed.

    Attributes:
        path: The directory that was searched.
        reason: What is there instead.
    """

    path: str
    reason: str

    def __init__(self, *, path: str, reason: str, fix: str | None = None) -> None:
        self._tell(f"no checkpoint in {path!r}: {reason}", fix=fix, path=path, reason=reason)


class CheckpointDamagedError(DistckptError, ValueError):
    """A checkpoint's bytes are not the ones that were written.

    Attributes:
        path: The checkpoint's directory.
        file: The damaged file, relative to `path`; None if several are.
        problem: What was expected and what was found.
        step: The checkpoint's step; None if it could not be read.
    """

    path: str
    file: str | None
    problem: str
    step: int | None

    def __init__(
        self,
        *,
        path: str,
        problem: str,
        file: str | None = None,
        step: int | None = None,
        fix: str | None = None,
    ) -> None:
        what = f"{path!r}" if step is None else f"step {step} in {path!r}"
        where = "" if file is None else f"{file!r} "
        self._tell(f"{what}: {where}{problem}", fix=fix, path=path, file=file, problem=problem, step=step)


class FormatVersionError(DistckptError, ValueError):
    """A checkpoint was written in a format that this version does not read.

    Attributes:
        path: The manifest's path.
        found: The format version that it states.
        supported: The newest format version that this distckpt reads.
    """

    path: str
    found: int
    supported: int

    def __init__(self, *, path: str, found: int, supported: int, fix: str | None = None) -> None:
        message = f"{path!r} has format version {found}; this distckpt reads up to {supported}"
        advice = "pip install --upgrade distckpt"
        self._tell(message, fix=fix or advice, path=path, found=found, supported=supported)


class StateMismatchError(DistckptError, ValueError):
    """The checkpoint does not fit the state that it should be loaded into; nothing was changed.

    Attributes:
        path: The checkpoint's directory.
        step: The checkpoint's step.
        problems: One line for each key that does not fit, most important first.
    """

    path: str
    step: int
    problems: list[str]

    def __init__(self, *, path: str, step: int, problems: list[str], fix: str | None = None) -> None:
        shown = problems[:SHOWN_PROBLEMS]
        if len(problems) > len(shown):
            shown = [*shown, f"and {len(problems) - len(shown)} more"]
        listed = "".join(f"\n  {problem}" for problem in shown)
        self._tell(
            f"checkpoint step {step} in {path!r} does not fit the state; nothing was loaded:{listed}",
            fix=fix,
            path=path,
            step=step,
            problems=problems,
        )


class StateLoadError(DistckptError, RuntimeError):
    """An object of the state did not take what the checkpoint holds for it; those before it are loaded.

    Attributes:
        key: Its key in the state.
        cause: The error of its own `load_state_dict`, with the type's name.
    """

    key: str
    cause: str

    def __init__(self, *, key: str, cause: str, fix: str | None = None) -> None:
        self._tell(
            f"state key {key!r} did not take what the checkpoint holds for it: {cause}",
            fix=fix or "build the state as it was when it was saved, and anew: it is loaded in part",
            key=key,
            cause=cause,
        )


class UnsafeFileError(DistckptError, ValueError):
    """A file of another tool asks for more than tensors and plain values; nothing of it was run or loaded.

    Attributes:
        path: The file.
        problem: What it asks for.
    """

    path: str
    problem: str

    def __init__(self, *, path: str, problem: str, fix: str | None = None) -> None:
        self._tell(f"{path!r} is not opened: {problem}", fix=fix, path=path, problem=problem)


class UnsupportedStateError(DistckptError, TypeError):
    """The state holds something that cannot be saved safely and exactly.

    Attributes:
        key: The entry's name in the state.
        problem: What it is and why it is refused.
    """

    key: str
    problem: str

    def __init__(self, *, key: str, problem: str, fix: str | None = None) -> None:
        self._tell(f"state entry {key!r} {problem}", fix=fix, key=key, problem=problem)


class RankFailedError(DistckptError, RuntimeError):
    """One or more ranks failed at something that all ranks do together.

    Attributes:
        action: What the ranks were doing.
        rank: The lowest rank that failed.
        host: The host that it runs on.
        cause: Its error, with the type's name.
    """

    action: str
    rank: int
    host: str
    cause: str

    def __init__(
        self, *, action: str, rank: int, host: str, cause: str, others: int = 0, fix: str | None = None
    ) -> None:
        more = f" (and {others} more)" if others else ""
        self._tell(
            f"{action} abandoned: rank {rank} (host {host}){more} failed: {cause}",
            fix=fix,
            action=action,
            rank=rank,
            host=host,
            cause=cause,
            others=others,
        )


class RankTimeoutError(DistckptError, TimeoutError):
    """Ranks did not arrive in time at something that all ranks do together.

    Attributes:
        action: What the ranks were doing.
        missing: The ranks that did not arrive, lowest first.
        timeout_s: How long was waited, in seconds.
    """

    action: str
    missing: list[int]
    timeout_s: float

    def __init__(self, *, action: str, missing: list[int], timeout_s: float, fix: str | None = None) -> None:
        ranks = ", ".join(str(rank) for rank in missing[:SHOWN_PROBLEMS])
        noun = "rank" if len(missing) == 1 else "ranks"
        self._tell(
            f"{action} abandoned: {noun} {ranks} did not arrive within {timeout_s:g} s",
            fix=fix or "look at the log of that rank; it died, hangs, or needs a longer timeout_s",
            action=action,
            missing=missing,
            timeout_s=timeout_s,
        )


class DirectoryBusyError(DistckptError, BlockingIOError):
    """Another job owns the run's directory; it alone may save there.

    Attributes:
        path: The directory.
        host: The host of the owner's rank 0; None if its lease cannot be read.
        pid: The process number of the owner's rank 0 there; None likewise.
        since: When the owner took the directory, in seconds since 1970, by its clock; None likewise.
        taken_over: Whether it was this job's before.
    """

    path: str
    host: str | None
    pid: int | None
    since: float | None
    taken_over: bool

    def __init__(
        self,
        *,
        path: str,
        host: str | None,
        pid: int | None,
        since: float | None,
        taken_over: bool = False,
        fix: str | None = None,
    ) -> None:
        owner = "a job that does not say who it is" if host is None else f"process {pid} on host {host!r}"
        begun = "" if since is None else time.strftime(", since %Y-%m-%d %H:%M:%S UTC", time.gmtime(since))
        if taken_over:
            message = f"{path!r} was taken over from this job by {owner}{begun}; this job commits nothing more there"
            advice = "let this job end; the other one has gone on from the newest checkpoint"
        else:
            message = f"{path!r} belongs to another job: {owner}{begun}"
            advice = "wait for that job, or stop it, or give this one a directory of its own; of a dead job no trace "
            advice += "needs to be removed"
        self._tell(message, fix=fix or advice, path=path, host=host, pid=pid, since=since, taken_over=taken_over)


class SaveInFlightError(DistckptError, RuntimeError):
    """A save was refused because the one before it is still being written, and waiting was not wanted.

    Attributes:
        step: The step that was to be saved.
        in_flight: The step whose save is still being written.
    """

    step: int
    in_flight: int

    def __init__(self, *, step: int, in_flight: int, fix: str | None = None) -> None:
        message = f"save of step {step} refused: the save of step {in_flight} is still being written"
        advice = 'save less often, or let saves wait or be skipped: CheckpointManager(..., when_busy="wait")'
        self._tell(message, fix=fix or advice, step=step, in_flight=in_flight)


class StateDivergedError(DistckptError, RuntimeError):
    """Ranks do not hold the same parameters or optimizer states where they should.

    Attributes:
        step: The step that was to be saved.
        names: The tensors that differ, of the sample that was compared.
        ranks: The ranks that hold something else than most.
    """

    step: int
    names: list[str]
    ranks: list[int]

    def __init__(self, *, step: int, names: list[str], ranks: list[int], fix: str | None = None) -> None:
        odd = ", ".join(map(str, ranks[:SHOWN_PROBLEMS]))
        advice = "restore an older checkpoint, and look at the hardware of these ranks, and at what changes parameters "
        advice += "beside the optimizer; state that is meant to differ is marked by PerRank(...)"
        message = f"step {step}: replicas have diverged: rank {odd} has other values in "
        self._tell(message + listed(names), fix=fix or advice, step=step, names=names, ranks=ranks)


class NonFiniteStateError(DistckptError, ArithmeticError):
    """Parameters or optimizer states hold NaN or infinities.

    Attributes:
        step: The step that was to be saved.
        names: The tensors that do.
    """

    step: int
    names: list[str]

    def __init__(self, *, step: int, names: list[str], fix: str | None = None) -> None:
        advice = "restore an older checkpoint, and lower the learning rate or clip the gradients"
        self._tell(f"step {step}: NaN or infinities in {listed(names)}", fix=fix or advice, step=step, names=names)
