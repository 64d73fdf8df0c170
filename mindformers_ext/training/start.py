"""From run_mindformer.py's arguments to a run; imports nothing heavy before the arguments are right."""

import ctypes
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mindformers_ext.config.command_line import all_overrides, build_parser, find

STARTED = time.monotonic()
signals: list[signal.Signals] = []  # that asked this process to end after its step (training/steering.py)

GRAPH_KERNEL_FLAGS = "MS_DEV_GRAPH_KERNEL_FLAGS"  # MindSpore's

# What launchers and platforms export and MindSpore or MindFormers read, to find out which of several processes this is.
PLACE_IN_A_CLUSTER = (
    "RANK_ID RANK_SIZE RANK_TABLE_FILE LOCAL_RANK LOCAL_RANK_SIZE MS_ROLE MS_WORKER_NUM MS_NODE_ID MS_SCHED_HOST "
    "MS_SCHED_PORT OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK PMIX_RANK"
)


def forget_other_processes(use_parallel: bool) -> None:
    """Take a cluster's variables out of the environment of a run that is one process to MindSpore.

    Such a run would read a part of the samples and wait for processes that do not exist.
    """
    from mindformers_ext.collectives.rank_job import is_cpu_rank

    if (use_parallel and not is_cpu_rank()) or os.environ.get("MS_SIMULATION_LEVEL"):
        return
    found = {name: os.environ.pop(name) for name in PLACE_IN_A_CLUSTER.split() if name in os.environ}
    if found:
        names = ", ".join(f"{name}={value}" for name, value in found.items())
        print(f"ignored in the environment, as this run is one process for MindSpore: {names}", file=sys.stderr)


def listen() -> None:
    """Let SIGTERM and SIGUSR1 ask for a graceful exit."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: signals.append(signal.Signals(number)))


def prepare_environment(register_path: str, output_dir: str) -> None:
    """Let MindFormers find the model's files, put its logs into output_dir, and keep MindSpore's warnings back."""
    os.environ["REGISTER_PATH"] = str(find(register_path).resolve())
    os.environ.setdefault("LOG_MF_PATH", str(Path(output_dir) / "log"))
    os.environ.setdefault("OM_MODULES_CACHE", str(Path(output_dir) / "log" / "modules"))  # auto_register's own copy
    os.environ.setdefault("GLOG_v", "3")
    if os.environ["REGISTER_PATH"] not in sys.path:
        sys.path.insert(0, os.environ["REGISTER_PATH"])


def enable_graph_kernels(flags: str | None) -> None:
    """Hand context.graph_kernel_flags to MindSpore, behind those that the environment has."""
    if flags:
        os.environ[GRAPH_KERNEL_FLAGS] = " ".join(filter(None, (os.environ.get(GRAPH_KERNEL_FLAGS), flags)))


def run(arguments: list[str], description: str = "", register: Sequence[str] = ()) -> None:
    """Parse run_mindformer.py's arguments, check the YAML and run its mode.

    Args:
        register: modules whose classes the run names beside those of training/register.py.
    """
    options, rest = build_parser(description).parse_known_args(arguments)
    from mindformers_ext.built_library import built_library
    from mindformers_ext.config.data_check import check_data
    from mindformers_ext.config.run import read_run
    from mindformers_ext.config.run_rules import dataset_in_use, refuse
    from mindformers_ext.config.strategy_rules import check_run

    asked = read_run(find(options.config), overrides=all_overrides(options, rest))
    forget_other_processes(asked.sections.use_parallel)
    refuse(asked, check_run(asked))
    name, read = dataset_in_use(asked)
    if read is not None:
        check_data(asked, name)
    ctypes.CDLL(str(built_library(Path(__file__).parent, "_interrupt"))).end_when_interrupted()
    if asked.trains and asked.sections.use_graceful_exit:
        listen()
    prepare_environment(options.register_path, asked.sections.output_dir)
    enable_graph_kernels(asked.sections.context.graph_kernel_flags)
    logging.raiseExceptions = False  # a log that cannot be written is no page of tracebacks
    # After the environment, which MindFormers reads while it is imported.
    from mindformers_ext.training.run_modes import run_mode

    for module in register:
        importlib.import_module(module)
    run_mode(asked, options.predict_data)
