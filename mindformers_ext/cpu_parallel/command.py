"""What a run_mindformer.py command line asks for; imports nothing heavy."""

from pathlib import Path
from typing import NoReturn

from mindformers_ext.config.command_line import all_overrides, build_parser, find
from mindformers_ext.config.run import Run, read_run
from mindformers_ext.errors import ConfigError


def read_plan(command: list[str], worker_num: int | None = None) -> Run:
    """The plan of the run that `run_mindformer.py` arguments describe. Raises ConfigError."""

    def refuse(message: str) -> NoReturn:
        raise ConfigError(message)

    parser = build_parser()
    parser.error = refuse  # in place of a page of usage
    options, rest = parser.parse_known_args(command)
    return read_run(find(options.config), worker_num, all_overrides(options, rest))


def absolute(command: list[str]) -> tuple[str, ...]:
    """The command with absolute paths, for a process that runs in another folder."""
    options, _ = build_parser().parse_known_args(command)
    return (*command, "--config", str(find(options.config).resolve()), "--register_path", str(model_folder(command)))


def model_folder(command: list[str]) -> Path:
    """Where the command says that the model's Python files are."""
    return find(build_parser().parse_known_args(command)[0].register_path).resolve()
