"""From run_mindformer.py's arguments to a run; imports nothing heavy before the arguments are right."""

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.config.command_line import all_overrides, build_parser, find


def prepare_environment(register_path: str, output_dir: str) -> None:
    """Let MindFormers find the model's files, put its logs into output_dir, and keep MindSpore's warnings back."""
    os.environ["REGISTER_PATH"] = str(find(register_path).resolve())
    os.environ.setdefault("LOG_MF_PATH", str(Path(output_dir) / "log"))
    os.environ.setdefault("OM_MODULES_CACHE", str(Path(output_dir) / "log" / "modules"))  # auto_register's own copy
    os.environ.setdefault("GLOG_v", "3")
    if os.environ["REGISTER_PATH"] not in sys.path:
        sys.path.insert(0, os.environ["REGISTER_PATH"])


def run(arguments: list[str], description: str = "", register: Sequence[str] = ()) -> None:
    """Parse run_mindformer.py's arguments, check the YAML and run its mode.

    Args:
        register: modules whose classes the run names beside those of training/register.py.
    """
    options, rest = build_parser(description).parse_known_args(arguments)
    from mindformers_ext.config.run import read_run
    from mindformers_ext.config.run_rules import refuse
    from mindformers_ext.config.strategy_rules import check_run

    asked = read_run(find(options.config), overrides=all_overrides(options, rest))
    refuse(asked, check_run(asked))
    prepare_environment(options.register_path, asked.sections.output_dir)
    logging.disable(logging.WARNING)  # MindFormers tells of optional packages that are missing
    # After the environment, which MindFormers reads while it is imported.
    from mindformers_ext.training.run_modes import run_mode

    for module in register:
        importlib.import_module(module)

    logging.disable(logging.NOTSET)
    run_mode(asked, options.predict_data)
