"""Errors that are the user's to mend; run_mindformer.py prints them as one sentence, everything else as a traceback."""

import sys
from collections.abc import Callable


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


def exit_code_of(work: Callable[[], int | None]) -> int:
    """Do a command line's work and return its exit code; the user's errors are printed as sentences."""
    try:
        return work() or 0
    except UserError as error:
        for sentence in error.sentences:
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        return error.exit_code
