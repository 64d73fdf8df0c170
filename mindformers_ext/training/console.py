"""What a run prints: its own lines, and what MindFormers warns of. Its log files have every message.

Extends mindformers.tools.logger and trainer.base_trainer (1.9.0), which print all that they log: 800 lines of
configuration before the first step, and a score of warnings about keys of their own template.
"""

import logging
import re
from pathlib import Path
from pprint import pformat
from typing import Any

import mindformers
from mindformers.tools.logger import LimitedRepeatHandler, get_logger
from mindformers.trainer import base_trainer

MINDFORMERS = str(Path(mindformers.__file__).parent)
# Warnings that every run gets, whatever its YAML says.
OF_EVERY_RUN = (
    "The input config .* is empty",  # sections that a YAML may leave out
    "Some configs in yaml are useless for",  # one YAML serves training, evaluation and prediction
    "The config .* is deprecated",  # keys of MindFormers' own template, and of all YAMLs of 1.9
    "The functionality of setting `resume_training`",
    "`full_batch` will be deprecated",
    "It will download files from openMind Hub",  # auto_register's files are here
    "Input model name is not in the supported list|See the list of supported task|The default model config: ",
    "Sink mode is False, per epoch size is invalid",
    "The Lazy Inline compilation acceleration feature",
    "When using the .* the MFPipelineWithLossScaleCell class is used",
)


class Console(logging.Formatter, logging.Filter):
    """Which messages are printed, and how: with time and text, as cpu_parallel/job.py reads them again."""

    unheard = re.compile("|".join(OF_EVERY_RUN))

    def filter(self, record: logging.LogRecord) -> bool:
        own = not record.pathname.startswith(MINDFORMERS) and record.pathname != __file__
        if own or record.levelno >= logging.ERROR:
            return True
        return record.levelno >= logging.WARNING and not self.unheard.match(record.getMessage())

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return f"{self.formatTime(record, '%Y-%m-%d %H:%M:%S')} {level}{record.message}"


def print_own_lines() -> str:
    """Let MindFormers' logger print as Console says; returns the path of the file that has every message."""
    handlers = get_logger().handlers
    console = Console()
    base_trainer.pprint = to_log_files
    for handler in handlers:
        if type(handler) is LimitedRepeatHandler:
            handler.addFilter(console)
            handler.setFormatter(console)
    return next(handler.baseFilename for handler in handlers if isinstance(handler, logging.FileHandler))


def to_log_files(config: Any) -> None:
    """Stands in for the pprint of a run's whole configuration."""
    get_logger().info("%s", pformat(config))
