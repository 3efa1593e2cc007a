"""Errors of the machine while data are read. They say nothing about an image: whoever meets one stops, and names it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from fastgan.errors import ArgumentError

# What a file may have for a property: no permission to read it, a link to itself, a name that is too long; EINVAL is
# what `open_regular` raises for a named pipe or a device.
_OF_A_FILE = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
# What a path that leads nowhere has.
_NOTHING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_REMEDIES = {
    errno.EMFILE: "raise the limit of open files, as with `ulimit -n 65536`",
    errno.ENFILE: "raise the system's limit of open files",
    errno.ENOMEM: "free some memory, or use fewer --workers",
    errno.ENOENT: "it was there before",
}


def is_machine_fault(error: BaseException) -> bool:
    """Return whether an error comes from the machine (disk, network, memory, descriptors) and not from a file.

    Pillow's readers raise OSError too, for damaged images; theirs have no errno. Code -9 of its decoders is "out of
    memory".
    """
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, OSError):
        return False
    if error.errno is None:
        return error.args[:1] == (-9,) or "out of memory" in str(error)
    return error.errno not in _OF_A_FILE


def machine_error(flag: str, name: str, error: BaseException) -> ArgumentError:
    """Return the error that names the file which could not be read, and what to do.

    Args:
        flag: the argument to name.
        name: of the file.
        error: see `is_machine_fault`.
    """
    code = error.errno if isinstance(error, OSError) and error.errno is not None else errno.ENOMEM
    remedy = _REMEDIES.get(code, "check the disk or network")
    return ArgumentError(flag, name, f"it cannot be read now ({os.strerror(code)}); {remedy}, and run the same again")


def raise_if_machine(error: BaseException, flag: str, name: str) -> None:
    """Raise `machine_error` if an error met while `name` was read or decoded is one of the machine."""
    if is_machine_fault(error):
        raise machine_error(flag, name, error) from error


def exists(path: Path, flag: str) -> bool:
    """Return whether something is at a path. `os.path.exists` and others say no if the machine cannot tell.

    Raises:
        ArgumentError: the machine cannot tell now.
        PermissionError: nobody may tell.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno in _NOTHING:
            return False
        raise_if_machine(error, flag, str(path))
        raise
    return True


def regular_status(path: Path, flag: str, name: str) -> tuple[os.stat_result | None, str]:
    """The status of a listed file, or None and why it cannot be read: opening a named pipe would block forever.

    Args:
        path: of the file.
        flag: the argument to name in errors.
        name: of the file in errors.

    Raises:
        ArgumentError: the machine cannot read it now, or it is gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        if error.errno in _NOTHING and path.is_symlink():
            return None, "a link that leads nowhere"
        raise_if_machine(error, flag, name)
        return None, error.strerror or str(error)
    return (status, "") if stat.S_ISREG(status.st_mode) else (None, "not a regular file")
