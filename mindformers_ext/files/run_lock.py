"""One run at a time writes into an output folder."""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from mindformers_ext.errors import ConfigError

NAME = "run.lock"
# File systems without locks, as some clusters have: there two runs at once stay possible.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_held: dict[Path, TextIO] = {}  # open until this process ends, and with them the locks


def hold(folder: str | Path) -> None:
    """Keep other runs out of `folder` until this process ends, however it ends.

    A lock of the process (POSIX), which its forked children do not inherit and no kill can leave behind.

    Raises:
        ConfigError: another run holds it.
    """
    path = Path(folder).resolve() / NAME
    if path in _held:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            file.close()
            return
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        raise ConfigError(
            f"output_dir {folder} is being written by another run ({holder}): wait for it, end it, or give another "
            "output_dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held[path] = file
