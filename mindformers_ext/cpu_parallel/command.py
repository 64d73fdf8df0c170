"""What a run_mindformer.py command line asks for; imports nothing heavy.

    python -m mindformers_ext.cpu_parallel.command run_mindformer.py --config Y [...]

Exit code 0 when the run splits one graph over devices (`cpu_parallel.job` runs it without cards), else 1.
"""

import sys

from mindformers_ext.config.command_line import all_overrides, build_parser, find
from mindformers_ext.config.run import Run, read_run
from mindformers_ext.errors import ConfigError


def read_plan(command: list[str], worker_num: int | None = None) -> Run:
    """The plan of the run that `run_mindformer.py` arguments describe. Raises ConfigError."""
    options, rest = build_parser().parse_known_args(command)
    return read_run(find(options.config), worker_num, all_overrides(options, rest))


def absolute(command: list[str]) -> tuple[str, ...]:
    """The command with absolute paths, for a process that runs in another folder."""
    options, _ = build_parser().parse_known_args(command)
    paths = ["--config", str(find(options.config).resolve()), "--register_path"]
    return (*command, *paths, str(find(options.register_path).resolve()))


def splits_one_graph(command: list[str]) -> bool:
    """True for semi-auto-parallel runs; a command that cannot be read is none, and says itself what is wrong."""
    if not any(word.partition("=")[0] == "--config" for word in command):
        return False
    try:
        return read_plan(command).is_semi_auto
    except ConfigError:
        return False


if __name__ == "__main__":
    sys.exit(0 if splits_one_graph(sys.argv[2:]) else 1)
