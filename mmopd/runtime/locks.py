"""Files that one process at a time holds; a killed one does not hold them any more."""

import errno
import fcntl
from pathlib import Path
from typing import IO, Any

from mmopd.errors import UserError

NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of file systems


def claim(file: IO[Any] | int, path: Path, holder: str) -> None:
    """Hold an open file until it is closed. On a file system without locks nobody is kept out.

    Args:
        path: for the message.
        holder: whoever else may hold it, and what they do with it.

    Raises:
        UserError: somebody does.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{path}: another {holder}; wait for it, or stop it") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
