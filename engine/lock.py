"""One process per run directory: a lock that dies with its owner, however it dies.

A POSIX record lock belongs to the process that took it. The locks of ``flock``, and open-file-description locks, belong
to the open file, which data workers inherit when they are forked: they would hold the lock of a killed owner for as
long as they live. The price is that a process cannot exclude itself, and loses the lock when it closes any descriptor
of the file; so nothing but this module opens it, and it remembers what it holds.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from engine.config import ConfigError

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_held: dict[Path, int] = {}  # descriptors of this process
_log = logging.getLogger(__name__)


def hold(directory: Path) -> None:
    """Lock ``directory``, which exists, until ``release`` or the end of this process.

    Raises:
        ConfigError: another process holds it.
        OSError: the lock's file cannot be written.
    """
    path = directory.resolve() / NAME
    if path in _held and _is_there(path):
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                _log.warning("%s cannot be locked (%s): let no second process use it", directory, error.strerror)
                return
            raise ConfigError(
                f"run_dir={directory} is in use by another process ({owner or 'of unknown number'}): "
                "wait for it to end, or name another folder."
            ) from None
        _held[path] = descriptor
        if _is_there(path):  # else its owner removed the file while this process was opening it
            break
        os.close(_held.pop(path))
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def still_holds(directory: Path) -> bool:
    """False where the locked directory, or the lock in it, has been removed or replaced meanwhile."""
    path = directory.resolve() / NAME
    return path not in _held or _is_there(path)


def release() -> None:
    """Give back every lock of this process and remove its file."""
    for path, descriptor in _held.items():
        if _is_there(path):
            with suppress(OSError):
                path.unlink()
        os.close(descriptor)
    _held.clear()


def _is_there(path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(_held[path]), path.stat())
    except OSError:
        return False
