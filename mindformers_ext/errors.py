"""Errors that are the user's to mend; run_mindformer.py prints them as one sentence, everything else as a traceback."""


class UserError(Exception):
    """One sentence that says what is wrong and what to do."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """Input that cannot work; the sentence names file, key and value."""

    exit_code = 2


class TrainingStopped(UserError, RuntimeError):
    """Training cannot go on; the sentence names step and value."""

    exit_code = 3
