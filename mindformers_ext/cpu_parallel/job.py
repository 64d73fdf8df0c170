"""Run a semi-auto-parallel YAML on a machine without a card: compile every rank, lower it, train as processes.

    python -m mindformers_ext.cpu_parallel.job --worker_num 8 [--log_dir output/msrun_log] \
        [--] run_mindformer.py --config Y [...]

scripts/msrun_launcher.sh starts it in place of msrun. Compiled ranks are kept in OUTPUT_DIR/compiled_ranks and used
again while all that decides them is the same (compiled_ranks.py). Logs: scheduler.log says what was done and which rank
failed first; worker_R.log is what rank R printed. Exit code 0, or that of the rank that failed first.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mindformers_ext.collectives.rank_job import RankJob
from mindformers_ext.config.run import Run
from mindformers_ext.config.run_rules import refuse
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.cpu_parallel import compiled_ranks, launch
from mindformers_ext.cpu_parallel.command import absolute, model_folder, read_plan
from mindformers_ext.errors import ConfigError, exit_code_of
from mindformers_ext.files import heartbeat, run_lock

ROOT = Path(__file__).resolve().parents[2]
OWN_LINE = re.compile(r"^[\d-]{10} [\d:]{8} (.+)")  # training/console.py prints them
MAX_RANKS = 64  # processes of one machine; more is a mistake


def run(command: list[str], worker_num: int, log_dir: Path, say: Callable[[str], None]) -> None:
    """Compile what is not compiled yet, then train.

    Raises:
        UserError: the strategy is not legal, a rank does not compile, or one fails; the sentence names it.
    """
    plan = read_plan(command, worker_num)
    refuse(plan, check_plan(plan))
    if worker_num > MAX_RANKS:
        raise ConfigError(f"WORKER_NUM is {worker_num}, but one machine without cards runs at most {MAX_RANKS} ranks")
    run_lock.hold(plan.sections.output_dir)  # for all ranks
    key = compiled_ranks.graph_key(plan, model_folder(command))
    folder = compiled_ranks.private_folder(Path(plan.sections.output_dir), key)
    if compiled_ranks.is_sound(folder, plan.device_num):
        say(f"the graphs of all {worker_num} ranks are in {folder} already")
    else:
        say(f"compiling the graphs of {worker_num} ranks for Ascend, and lowering them to CPU, in {folder}")
        builder = launch.RunBuilder(absolute(command), (str(ROOT),))
        with compiled_ranks.only_mine():
            launch.compile_ranks(builder, plan.device_num, folder, plan.pp)
            compiled_ranks.seal(folder, plan.device_num)
    if plan.only_compiles:
        say(f"{worker_num} ranks are compiled; a run with run_mode train starts from them")
        return
    say(f"starting {worker_num} ranks; their logs are {log_dir}/worker_*.log")
    train(command, rank_job(plan, folder), log_dir, say, plan)
    say(f"all {worker_num} ranks have finished")


def rank_job(plan: Run, folder: Path) -> RankJob:
    """The first rank of a plan whose compiled ranks are in `folder`; the name of its shared memory no other job has."""
    degrees = plan.pp, plan.cp * plan.mp, plan.pipeline.last.stage
    return RankJob(folder, uuid.uuid4().hex, 0, plan.device_num, *degrees)


def train(
    command: list[str],
    job: RankJob,
    log_dir: Path,
    say: Callable[[str], None] = lambda _: None,
    plan: Run | None = None,
) -> None:
    """Start all ranks and wait for them; `say` gets the lines that they print, each once.

    With `plan` their steps are timed, and signals are handed on, where it asks for that.

    Raises launch.RankError that names the first rank that failed.
    """
    threads = str(max((os.cpu_count() or 1) // job.world_size, 1))
    base = {"OMP_NUM_THREADS": threads, "GLOG_v": "3"} | dict(os.environ) | launch.bytecode_cache()
    base["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

    def files(rank: int) -> tuple[Path, Path]:
        return log_dir / f"worker_{rank}.failure.json", log_dir / f"worker_{rank}.log"

    def start(rank: int) -> subprocess.Popen:
        failure, log = files(rank)
        arguments = ["-m", "mindformers_ext.cpu_parallel.worker", str(failure), *command]
        own = replace(job, rank=rank).environment() | {"LOG_MF_PATH": str(log_dir / f"rank_{rank}")}
        return launch.start_rank(arguments, base | own, failure, log)

    def explain(rank: int, code: int) -> tuple[float, str]:
        return launch.failure_of(*files(rank), rank, code)

    output_dir = Path(plan.sections.output_dir) if plan else Path()
    bound = plan.sections.max_step_minutes if plan else None
    if bound is not None:
        heartbeat.clear(output_dir)
    ranks = [start(rank) for rank in range(job.world_size)]
    if plan and plan.sections.use_graceful_exit:
        hand_on(ranks)
    follower = launch.Follower([files(rank)[1] for rank in range(job.world_size)], OWN_LINE, say)

    def watch() -> None:
        follower.read()
        late = None if bound is None else heartbeat.hung(heartbeat.read(output_dir), bound * 60)
        if late is not None:
            say(stack_of(late, files(late.rank)[1]))
            raise launch.RankError(f"{late} made no step for {bound:g} minutes; its stack is in {files(late.rank)[1]}")

    launch.supervise(ranks, explain, watch)


def hand_on(ranks: list[subprocess.Popen]) -> None:
    """Let the signals that ask for a graceful exit reach all ranks."""

    def send(number: int, _: object) -> None:
        for rank in ranks:
            rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, send)


def stack_of(beat: heartbeat.Beat, log: Path) -> str:
    """Where a rank is, which prints it into its log."""
    before = log.stat().st_size
    heartbeat.show_stack(beat)
    with log.open(encoding="utf-8", errors="replace") as stream:
        stream.seek(before)
        return stream.read()


def main(argv: list[str] | None = None) -> int:
    """Run the job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker_num", type=int, default=1)
    parser.add_argument("--log_dir", type=Path, default=Path("output/msrun_log"))
    parser.add_argument("command", nargs=argparse.REMAINDER, help="run_mindformer.py --config Y ...")
    options = parser.parse_args(argv)
    command = [word for word in options.command if word != "--"][1:]
    options.log_dir.mkdir(parents=True, exist_ok=True)
    with (options.log_dir / "scheduler.log").open("w") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=log, flush=True)

        return exit_code_of(lambda: run(command, options.worker_num, options.log_dir, say), say)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
