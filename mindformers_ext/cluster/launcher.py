"""Start one process per device with MindSpore's msrun, with the arguments of MindFormers' launcher.

    bash scripts/msrun_launcher.sh \
        "run_mindformer.py --config research/deepseek3/deepseek3_1b/pretrain_deepseek3_1b.yaml" 8

After the command come
WORKER_NUM [LOCAL_WORKER_NUM [MASTER_ADDR [MASTER_PORT [NODE_RANK [LOG_DIR [JOIN [CLUSTER_TIME_OUT]]]]]]].

MindFormers' short form WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT works too. Without the first five (given as
"" before a LOG_DIR) the place of this machine comes from the cluster (nodes.py), and JOIN is True: where the launcher
ends, a cluster ends the job.
On a machine without NPUs a semi-auto-parallel YAML runs too: every rank is compiled for Ascend, lowered to CPU and
run as a process (cpu_parallel/job.py); the launcher then waits for the end, whatever JOIN says.
The command is split into words as a shell does, but nothing in it is run or replaced: no $(...), $NAME or [0-9].
A command without --use_parallel gets --use_parallel True. With JOIN True the exit code is the workers', and machines of
a job watch each other over the port after MASTER_PORT (watch.py).
"""

import glob
import os
import shlex
import shutil
import socket
import sys
from pathlib import Path

from mindformers_ext.cluster import nodes, watch
from mindformers_ext.config.command_line import ROOT
from mindformers_ext.config.command_line import find as find_file
from mindformers_ext.config.run import Run
from mindformers_ext.config.run_rules import refuse
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.cpu_parallel.command import read_plan
from mindformers_ext.cpu_parallel.compiled_ranks import graph_key
from mindformers_ext.errors import ConfigError, exit_code_of

NO_COMMAND = 'no command given; usage: msrun_launcher.sh "run_mindformer.py --config Y" [WORKER_NUM ...]'
LOG_DIR, TIME_OUT = "output/msrun_log", "7200"
COMPILE_CACHE = "compile_cache"  # of output_dir
TRUE = ("True", "true")
TRUE_OR_FALSE = (*TRUE, "False", "false")


def words_of(arguments: list[str]) -> list[str]:
    """The words of the command, with --use_parallel. Raises ConfigError when they name no script or no YAML."""
    if not arguments:
        raise ConfigError(NO_COMMAND)
    try:
        words = shlex.split(arguments[0])
    except ValueError as error:
        raise ConfigError(f"the command cannot be split into words ({error}): {arguments[0]}") from None
    if not words:
        raise ConfigError(NO_COMMAND)
    if not find_file(words[0]).is_file():
        raise ConfigError(f"the command starts with {words[0]!r}, which is no file here or in {ROOT}")
    configs = [*words, ""][words.index("--config") + 1 :][:1] if "--config" in words else []
    configs += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    if not configs:
        raise ConfigError(f'the command has no --config; write "{words[0]} --config Y ..."')
    for config in configs:
        if not find_file(config).is_file():
            raise ConfigError(f"--config {config!r} is no file here or in {ROOT}")
    return words if any(word.startswith("--use_parallel") for word in words) else [*words, "--use_parallel", "True"]


def long_form(arguments: list[str]) -> list[str]:
    """The eight arguments behind the command, empty where they are not given."""
    if len(arguments) > 8:
        raise ConfigError(f"{len(arguments) + 1} arguments given, at most 9 are known; quote the command as one")
    if len(arguments) == 5 and arguments[3] in TRUE_OR_FALSE:
        workers, port, *rest = arguments
        arguments = [workers, workers, nodes.ALONE, port, "0", *rest]
    return [*arguments, *[""] * 8][:8]


def ranks_of(plan: Run) -> int:
    """Ranks of a run where the cluster tells only its machines: what the degrees ask for."""
    if plan.device_num == 1 and not plan.is_semi_auto:
        raise ConfigError(
            f"{plan.path}: parallel_config.data_parallel is 1, but the run is to be shared by several machines; set it "
            "to the number of ranks, or give WORKER_NUM, LOCAL_WORKER_NUM, MASTER_ADDR, MASTER_PORT and NODE_RANK"
        )
    return plan.device_num


def port_is_free(port: int) -> bool:
    """True when a scheduler can listen there."""
    try:
        with socket.socket() as tried:
            tried.bind(("", port))
    except (OSError, OverflowError):
        return False
    return True


def main(arguments: list[str]) -> int:
    """Check, then become msrun or the job of CPU ranks, or watch msrun on one of several machines.

    Raises:
        ConfigError: what cannot work, before any process starts.
    """
    if arguments[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return 0
    given, log_dir, join, time_out = options_of(arguments[1:])
    words = words_of(arguments)
    plan = read_plan(words[1:])
    place = nodes.find(given, os.environ, lambda: ranks_of(plan))
    if plan.is_semi_auto:
        plan.device_num = place.worker_num
        refuse(plan, check_plan(plan))
    cards = len(glob.glob("/dev/davinci[0-9]*"))
    if cards and place.local_worker_num > cards:
        raise ConfigError(f"LOCAL_WORKER_NUM is {place.local_worker_num}, but this machine has {cards} NPUs")
    print(place, flush=True)
    if not cards:
        threads = max((os.cpu_count() or 1) // place.local_worker_num, 1)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not cards and plan.is_semi_auto:
        if place.nodes > 1:
            raise ConfigError(
                f"LOCAL_WORKER_NUM is {place.local_worker_num}, but without NPUs all {place.worker_num} ranks run on "
                "one machine"
            )
        job = ["--worker_num", str(place.worker_num), "--log_dir", log_dir]
        os.execvp(sys.executable, [sys.executable, "-m", "mindformers_ext.cpu_parallel.job", *job, *words])
    if plan.is_semi_auto:
        use_compile_cache(plan)
    waits = join in TRUE if join else place.of_a_cluster
    watched = waits and place.nodes > 1
    check_ports(place, watched)
    print(f"Starting {place.local_worker_num} processes; their logs are in {log_dir}/worker_*.log", flush=True)
    command = [program("msrun"), f"--bind_core={bool(cards)}", *msrun_place(place)]
    command += [f"--log_dir={log_dir}", f"--join={waits}", f"--cluster_time_out={time_out}"]
    command += [str(find_file(words[0])), *words[1:]]
    if watched:
        return watch.run(command, place, place.master_port + 1)
    os.execvp(command[0], command)


def options_of(arguments: list[str]) -> tuple[list[str], str, str, str]:
    """The place's five arguments, log folder, JOIN or "", and time out. Raises ConfigError for what they cannot be."""
    *given, log_dir, join, time_out = long_form(arguments)
    if any(given):
        nodes.find(given, {}, int)  # its sentences before those of the YAML
    if join and join not in TRUE_OR_FALSE:
        raise ConfigError(f"JOIN is {join!r}, but must be True or False")
    if time_out:
        nodes.count("CLUSTER_TIME_OUT", time_out)
    return given, log_dir or LOG_DIR, join, time_out or TIME_OUT


def msrun_place(place: nodes.Place) -> list[str]:
    """A place as msrun's options."""
    names = ("worker_num", "local_worker_num", "master_addr", "master_port", "node_rank")
    return [f"--{name}={getattr(place, name)}" for name in names]


def check_ports(place: nodes.Place, watched: bool) -> None:
    """On machine 0: raises ConfigError when its scheduler, or the watch, could not listen."""
    if place.node_rank:
        return
    if not port_is_free(place.master_port):
        raise ConfigError(f"MASTER_PORT {place.master_port} is taken or not allowed on this machine; choose another")
    if watched and not port_is_free(place.master_port + 1):
        raise ConfigError(
            f"MASTER_PORT is {place.master_port}, but over the next port machines watch each other, and that is taken "
            "on this machine; choose another"
        )


def use_compile_cache(plan: Run) -> None:
    """Let MindSpore keep what run_mode compile compiles, and find it again.

    MindSpore compares source files only, so the folder is named by all that decides the graph.
    """
    folder = Path(plan.sections.output_dir).resolve() / COMPILE_CACHE / f"{graph_key(plan)}-{plan.device_num}"
    if plan.only_compiles or folder.exists():
        print(f"MindSpore's compile cache is {folder}", flush=True)
        os.environ |= {"MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(folder)}


def program(name: str) -> str:
    """A program in PATH, or beside this Python. Raises ConfigError when there is none."""
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) is not None:
        return name
    if beside.exists():
        return str(beside)
    raise ConfigError(f"{name} is not installed; run bash scripts/install.sh first")


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
