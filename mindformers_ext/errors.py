"""Errors that are the user's to mend: every command line ends with them as one sentence, others are tracebacks."""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended
FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
# What a file system refuses; a connection or a child process is another matter.
OF_FILES = (*FULL, *NOT_ALLOWED, errno.EFBIG, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
OF_FILES += (errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY, errno.EBUSY)


class UserError(Exception):
    """One sentence that says what is wrong and what to do; or several, when several things are wrong."""

    exit_code = 1

    @property
    def sentences(self) -> list[str]:
        """Each of them, on one line."""
        return [" ".join(str(sentence).split()) for sentence in self.args]

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class ConfigError(UserError, ValueError):
    """Input that cannot work; the sentence names file, key and value."""

    exit_code = 2


class TrainingStopped(UserError, RuntimeError):
    """Training cannot go on; the sentence names step and value."""

    exit_code = 3


def is_full_or_closed(error: BaseException) -> bool:
    """True for a disk that takes nothing more, or nothing from this user: whatever was tried, that is the cause."""
    return isinstance(error, OSError) and error.errno in (*FULL, *NOT_ALLOWED)


def of_files(error: OSError) -> str | None:
    """What a file system refused: path, reason, free space and what to do; None where the error is no file system's."""
    if error.errno not in OF_FILES:
        return None
    name = error.filename2 or error.filename  # of a copy, what is written
    path = os.fsdecode(name) if isinstance(name, (str, bytes, os.PathLike)) else None
    reason = os.strerror(error.errno)
    text = f"{path}: {reason}" if path else reason
    if error.errno in FULL:
        return f"{text}; make room{free_space(path)} or give another folder"
    if error.errno in NOT_ALLOWED:
        return f"{text}; give a folder that this user may use"
    return text


def free_space(path: str | Path | None) -> str:
    """' (N MB free in FOLDER)' for the nearest folder of a path that exists."""
    if path is None:
        return ""
    folder = next((folder for folder in Path(path).absolute().parents if folder.is_dir()), Path("/"))
    return f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free in {folder})"


def to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def exit_code_of(work: Callable[[], int | None], say: Callable[[str], None] = to_stderr) -> int:
    """Do a command line's work and return its exit code.

    The user's errors, what a file system refuses and Ctrl-C are said as sentences, one a line.
    """
    try:
        return work() or 0
    except UserError as error:
        for sentence in error.sentences:
            say(f"error: {sentence}")
        return error.exit_code
    except OSError as error:
        sentence = of_files(error)
        if sentence is None:
            raise
        say(f"error: {sentence}")
        return UserError.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
