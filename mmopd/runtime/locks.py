"""Locks on files: one process holds a file at a time; the lock of a killed process is released."""

import errno
import fcntl
from pathlib import Path
from typing import IO, Any

from mmopd.errors import UserError

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # errors of file systems without locks


def claim(file: IO[Any] | int, path: Path, holder: str) -> None:
    """Lock an open file until it is closed; do nothing on a file system without locks.

    Args:
        file: the open file, or its descriptor.
        path: for the message.
        holder: description of a possible other holder and its work, for the message.

    Raises:
        UserError: another process holds the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another {holder}; wait for it, or stop it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
