"""Start a training again when it dies, from its last healthy checkpoint.

    Y=research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml
    bash scripts/keep_running.sh --restarts 10 --hours 24 -- python run_mindformer.py --config $Y
    bash scripts/keep_running.sh -- bash scripts/msrun_launcher.sh "run_mindformer.py --config $Y" 8

It gives up after RESTARTS restarts in HOURS hours, and at once when the YAML is wrong or somebody pressed Ctrl-C. A
step in which the run has died DEATHS times is left out: its samples are not read again. What it knows is kept in
OUTPUT_DIR/keep_running.json, so it can be started again itself. SIGTERM and SIGUSR1 are handed on, and end it with
the run.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mindformers_ext.bin_dataset.sample_order import LeftOut, Place, ranges_of, samples_of_step
from mindformers_ext.config.data_check import read_loader
from mindformers_ext.config.recipe import micro_batch_key, phase_after, phases, samples_per_step
from mindformers_ext.config.run import Run
from mindformers_ext.cpu_parallel.command import read_plan
from mindformers_ext.errors import INTERRUPTED, ConfigError, TrainingStopped, exit_code_of
from mindformers_ext.files import heartbeat
from mindformers_ext.files.atomic import write_json
from mindformers_ext.files.json_files import convert, read_object
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, open_source
from mindformers_ext.sharded_checkpoint.writer import LATEST

SCRIPT = "run_mindformer.py"
STATE = "keep_running.json"  # in output_dir
MAX_STEP_MINUTES = 30  # for a YAML that does not say it
PATIENCE = 2.0  # bounds: a launcher of ranks on CPU and the ranks themselves act before
POLL_SECONDS = 0.5
NO_RESTART = (ConfigError.exit_code, INTERRUPTED)


@dataclass
class State:
    """What happened so far."""

    restarts: list[float] = field(default_factory=list)  # when, seconds since 1970
    died: dict[int, int] = field(default_factory=dict)  # how often in which step
    leave_out: list[list[int]] = field(default_factory=list)  # ranges of samples, beside the YAML's own
    phases: list[int] = field(default_factory=list)  # of the recipe that were begun, by the step before them


def words_of(command: list[str]) -> list[str]:
    """run_mindformer.py's own arguments in a command, which a launcher takes as one word."""
    for place, word in enumerate(command):
        if word.endswith(SCRIPT):
            return command[place + 1 :]
        if SCRIPT in word:
            return shlex.split(word)[1:]
    raise ConfigError(f"the command is {shlex.join(command)!r}, which does not start {SCRIPT}")


def with_options(command: list[str], options: list[str]) -> list[str]:
    """The command with more arguments for run_mindformer.py."""
    for place, word in enumerate(command):
        if SCRIPT in word and not word.endswith(SCRIPT):
            return [*command[:place], f"{word} {shlex.join(options)}", *command[place + 1 :]]
    return [*command, *options]


def left_out_so_far(run: Run, state: State) -> list[list[int]]:
    """Ranges of samples that are not read."""
    return [*(run.value("train_dataset.data_loader.leave_out") or []), *state.leave_out]


def options_of(run: Run, state: State) -> list[str]:
    """What the next start is told: where to go on, with which batch, and what not to read."""
    options = []
    root = Path(run.sections.output_dir) / "checkpoint"
    if run.sections.recipe and run.sections.recipe.micro_batches:
        options += [f"--{micro_batch_key(run)}", str(phase_after(phases(run), saved_step(run))[0].micro_batches)]
    if (root / LATEST).exists():
        options += ["--load_checkpoint", str(root), "--resume_training", "True", "--ignore_data_skip", "False"]
    if state.leave_out:
        options += ["--train_dataset.data_loader.leave_out", str(left_out_so_far(run, state))]
    if run.sections.max_step_minutes is None:
        options += ["--max_step_minutes", str(MAX_STEP_MINUTES)]
    return options


def samples_of(run: Run, state: State, step: int) -> list[list[int]]:
    """Ranges of the samples of a step of a training that goes on from the last checkpoint."""
    root = Path(run.sections.output_dir) / "checkpoint"
    source = open_source(root) if (root / LATEST).exists() else None
    meta = source.meta if isinstance(source, Checkpoint) else None
    after = Place(meta.step, meta.epoch, meta.consumed_samples) if meta else Place()
    skipped = 0 if meta else run.sections.data_skip_steps or 0
    left_out = LeftOut(left_out_so_far(run, state), read_loader(run, "train_dataset").count())
    whole = run.value("train_dataset.drop_remainder") is not False
    per_step = samples_per_step(run, phase_after(phases(run), step - 1)[0])
    return ranges_of(samples_of_step(left_out, per_step, step, skipped, after, whole))


def note_death(run: Run, state: State, deaths: int, say: Callable[[str], None]) -> None:
    """Remember the step in which the run died; leave it out when that is the `deaths`-th time, with 0 never."""
    beats = heartbeat.read(Path(run.sections.output_dir))
    if not beats:
        say("it died before its first step")
        return
    last = max(beats, key=lambda beat: beat.step)
    step = last.step if last.in_step else last.step + 1
    state.died[step] = state.died.get(step, 0) + 1
    say(f"it died at step {step}, for the {state.died[step]}. time")
    if 0 < deaths <= state.died[step] and run.sections.train_dataset.megatron is not None:
        run.device_num = len(beats)
        ranges = samples_of(run, state, step)
        state.leave_out += ranges
        state.died[step] = 0  # other samples now
        say(f"samples {ranges} of step {step} are left out from now on")


def keep_running(command: list[str], restarts: int, hours: float, deaths: int, say: Callable[[str], None]) -> int:
    """Run the command until it ends well; returns its exit code.

    Raises:
        TrainingStopped: it died too often.
    """
    run = read_plan(words_of(command))
    output_dir = Path(run.sections.output_dir)
    path = output_dir / STATE
    state = convert(read_object(path), State, path) if path.exists() else State()
    while True:
        heartbeat.clear(output_dir)
        code = run_once(with_options(command, options_of(run, state)), output_dir, bound_of(run), say)
        if code == 0 and begins_phase(run, state):
            say("the batch grows")
            continue
        if code == 0 or code in NO_RESTART:
            return code
        say(f"the run ended with exit code {code}")
        note_death(run, state, deaths, say)
        now = time.time()
        state.restarts = [then for then in state.restarts if now - then < hours * 3600]
        if len(state.restarts) >= restarts:
            raise TrainingStopped(
                f"the run died {len(state.restarts) + 1} times in {hours:g} hours, at last with exit code {code}: "
                f"see its log; --restarts allows more, and {path} holds what was tried"
            )
        state.restarts.append(now)
        write_json(path, asdict(state))
        say(f"restart {len(state.restarts)} of at most {restarts} in {hours:g} hours")


def saved_step(run: Run) -> int:
    """The step of the last checkpoint, 0 without."""
    root = Path(run.sections.output_dir) / "checkpoint"
    source = open_source(root) if (root / LATEST).exists() else None
    return source.meta.step if isinstance(source, Checkpoint) else 0


def begins_phase(run: Run, state: State) -> bool:
    """True when the run has ended because its recipe goes on with another batch; once for every phase."""
    begins = {phase.step for phase in phases(run)[1:]}.difference(state.phases)
    step = saved_step(run) if begins else 0
    if step not in begins:
        return False
    state.phases.append(step)
    return True


def bound_of(run: Run) -> float:
    """Seconds of a step after which a rank hangs."""
    return 60 * (run.sections.max_step_minutes or MAX_STEP_MINUTES)


def run_once(command: list[str], output_dir: Path, bound: float, say: Callable[[str], None]) -> int:
    """Run the command to its end, or end its ranks when one hangs; signals that ask for a graceful exit reach it."""
    process = subprocess.Popen(command)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    ended: list[int] = []

    def hand_on(number: int, _: object) -> None:
        ended.append(number)
        process.send_signal(number)

    for number in before:
        signal.signal(number, hand_on)
    try:
        while (code := process.poll()) is None:
            end_when_hung(output_dir, PATIENCE * bound, say)
            time.sleep(POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return INTERRUPTED if ended and code else code


def end_when_hung(output_dir: Path, seconds: float, say: Callable[[str], None]) -> None:
    """Show the stacks of a rank that hangs, and kill all ranks of this machine; whoever started them notices."""
    beats = heartbeat.read(output_dir)
    late = heartbeat.hung(beats, seconds)
    if late is None:
        return
    say(f"{late} gave no sign for {seconds:.0f} s; its stacks follow, here or in its log, and all ranks are ended")
    with suppress(OSError):
        heartbeat.show_stack(late)
    for beat in beats:
        with suppress(OSError):
            if beat.is_here:
                os.kill(beat.pid, signal.SIGKILL)
    time.sleep(1)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and keep the run running."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=10, help="at most so many")
    parser.add_argument("--hours", type=float, default=24.0, help="in so many hours")
    parser.add_argument("--deaths", type=int, default=2, help="in one step, after which it is left out; 0: never")
    parser.add_argument("command", nargs=argparse.REMAINDER, help=f"what starts {SCRIPT}")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command

    def say(text: str) -> None:
        print(f"keep_running: {text}", file=sys.stderr, flush=True)

    return keep_running(command, options.restarts, options.hours, options.deaths, say)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
