"""Exit codes, and which of them an error means."""

from __future__ import annotations

import errno
from enum import IntEnum

from distckpt.errors import (
    CheckpointDamagedError,
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    DependencyError,
    DirectoryBusyError,
    DistckptError,
    FormatVersionError,
    StateMismatchError,
    StorageError,
    UnsafeFileError,
    UnsupportedStateError,
    UsageError,
)


class Exit(IntEnum):
    """What a command leaves its process with; `distckpt.cli` has the table."""

    FINE = 0
    DIFFERENT = 1
    USAGE = 2
    NOTHING = 3
    STORAGE = 4
    UNREADABLE = 5
    EXISTS = 6
    BUSY = 7
    BUG = 70


def exit_of(error: DistckptError) -> Exit:
    """Return the exit code that an error means."""
    match error:
        case ConfigError() | UsageError() | DependencyError():
            return Exit.USAGE
        case CheckpointNotFoundError():
            return Exit.NOTHING
        case CheckpointExistsError():
            return Exit.EXISTS
        case DirectoryBusyError():
            return Exit.BUSY
        case StorageError():
            return Exit.EXISTS if error.errno == errno.EEXIST else Exit.STORAGE
        case CheckpointDamagedError() | FormatVersionError():
            return Exit.UNREADABLE
        case UnsafeFileError() | UnsupportedStateError() | StateMismatchError():
            return Exit.UNREADABLE
        case _:
            return Exit.BUG
