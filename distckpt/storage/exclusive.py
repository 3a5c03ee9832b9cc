"""Give a finished local file its final name, and never replace one that has it."""

from __future__ import annotations

import ctypes
import errno
import os

_RENAME_NOREPLACE = 1  # linux/fs.h
_UNSUPPORTED = {
    errno.EPERM,  # FAT and some network file systems answer so to link()
    errno.EMLINK,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
}


def name_exclusively(temporary: str, final: str, folder_fd: int) -> bool:
    """Give `temporary` the name `final`, both in the folder `folder_fd`, unless `final` exists.

    The temporary name may be left; removing it is the caller's.

    Returns:
        Whether the file system itself refused to replace; False if it knows no such call and the names were compared
        before, which two writers can slip through.

    Raises:
        FileExistsError: `final` exists; nothing was changed.
        OSError: It could not be renamed.
    """
    try:
        os.link(temporary, final, src_dir_fd=folder_fd, dst_dir_fd=folder_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return _rename_exclusively(temporary, final, folder_fd)
    return True


def _rename_exclusively(temporary: str, final: str, folder_fd: int) -> bool:
    """Move by renameat2, where the system and the file system know it, else by a look and a rename."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        source, target = os.fsencode(temporary), os.fsencode(final)
        if renameat2(folder_fd, source, folder_fd, target, _RENAME_NOREPLACE) == 0:
            return True
        number = ctypes.get_errno()
        if number not in _UNSUPPORTED:
            raise OSError(number, os.strerror(number), final)
    try:
        os.stat(final, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(temporary, final, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        return False
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), final)
