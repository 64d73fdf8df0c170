"""A run under scripts/keep_running.sh that is killed, stopped and switched off ends as if nothing had been."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.command_line import ROOT, TOY, run_command, run_environment
from training.test_resume import check_same_steps, four_ranks, metrics

from mindformers_ext.files import heartbeat
from mindformers_ext.sharded_checkpoint.audit import differences, verify_all
from mindformers_ext.sharded_checkpoint.reader import open_source

FAULTS = ("kill", "kill", "stop", "terminate", "switch")
SUPERVISOR = [
    "bash",
    str(ROOT / "scripts/keep_running.sh"),
    "--restarts",
    "1000",
    "--hours",
    "9",
    "--deaths",
    "0",
    "--",
]
HUNG = ["--max_step_minutes", "0.05", "--use_graceful_exit", "True"]


def toy(*arguments: str) -> list[str]:
    """80 steps of the toy in one process."""
    command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(TOY / "train_toy.yaml")]
    command += ["--register_path", str(TOY), "--runner_config.epochs", "10", "--callbacks.0.save_checkpoint_steps", "5"]
    return [*command, *HUNG, *arguments]


def ranks(*arguments: str) -> list[str]:
    """80 steps of DeepSeek-V3 in small over four ranks."""
    return four_ranks(*arguments, " ".join(HUNG))


class Campaign:
    """Disturbs a run of `command` in `folder/name` again and again until it has ended well."""

    def __init__(self, folder: Path, name: str, command: Callable[..., list[str]], faults: list[str], seed: int):
        self.folder, self.output = folder, folder / name
        self.command = [*SUPERVISOR, *command("--output_dir", name)]
        self.faults, self.random = faults, random.Random(seed)
        self.log = open(folder / f"{name}.log", "wb")  # noqa: SIM115 (of the supervisor, to the end)

    def start(self) -> None:
        self.supervisor = subprocess.Popen(
            self.command, cwd=self.folder, env=run_environment(), stdout=self.log, stderr=self.log
        )

    def wait_for_steps(self) -> bool:
        """Wait until the run has trained a little; False when it has ended."""
        pids, deadline = set(), time.monotonic() + 300
        wait = self.random.uniform(0, 1.0)
        while self.supervisor.poll() is None:
            assert time.monotonic() < deadline, "the run does not train"
            beats = [beat for beat in heartbeat.read(self.output) if beat.is_here and not beat.compiling]
            if beats and {beat.pid for beat in beats} != pids:
                pids = {beat.pid for beat in beats}
                time.sleep(wait)
                return self.supervisor.poll() is None
            time.sleep(0.02)
        return False

    def inflict(self, fault: str) -> None:
        """One fault, to a random rank where it is one rank's."""
        beats = [beat for beat in heartbeat.read(self.output) if beat.is_here]
        if fault == "switch":
            (self.output / "kill_switch").touch()
        elif fault == "terminate":
            self.supervisor.send_signal(signal.SIGTERM)
        elif beats:
            victim = self.random.choice(beats)
            victim_signal = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault]
            subprocess.run(["kill", f"-{victim_signal.value}", str(victim.pid)], stderr=subprocess.DEVNULL)
            self.wait_for_end_of(victim)

    def wait_for_end_of(self, victim: heartbeat.Beat) -> None:
        """Until whoever watches the rank has noticed."""
        deadline = time.monotonic() + 60
        while victim.is_here:
            assert time.monotonic() < deadline, "nobody ended the rank"
            time.sleep(0.02)

    def run(self) -> None:
        """Inflict all faults; the run then ends by itself."""
        self.start()
        for fault in self.faults:
            if not self.wait_for_steps():
                break
            self.inflict(fault)
            if fault in ("switch", "terminate"):  # ends with exit code 0, also when the run had ended before
                assert self.supervisor.wait(timeout=120) == 0, (fault, Path(self.log.name).read_text()[-3000:])
                verify_all(open_source(self.output / "checkpoint"))
                (self.output / "kill_switch").unlink(missing_ok=True)  # of a run that had ended
                self.start()
        code = self.supervisor.wait(timeout=600)
        text = Path(self.log.name).read_text()
        assert code == 0 or (code == 2 and "has trained" in text), text[-3000:]  # or nothing was left to train


def check(command: Callable[..., list[str]], folder: Path, reference: Path, faults: list[str], seed: int) -> str:
    """All of a campaign; returns what the supervisor said."""
    shared = set(Path("/dev/shm").iterdir())
    shutil.rmtree(folder / f"{reference.name}_disturbed", ignore_errors=True)
    campaign = Campaign(folder, f"{reference.name}_disturbed", command, faults, seed)
    if (reference / "compiled_ranks").exists():
        shutil.copytree(reference / "compiled_ranks", campaign.output / "compiled_ranks")
    campaign.run()
    assert check_same_steps(campaign.output, reference) == [record["step"] for record in metrics(reference)]
    verify_all(open_source(campaign.output / "checkpoint"))
    assert not list(differences(open_source(campaign.output / "checkpoint"), open_source(reference / "checkpoint")))
    assert set(Path("/dev/shm").iterdir()) <= shared
    return Path(campaign.log.name).read_text()


@pytest.fixture(scope="module")
def undisturbed(toy_folder: Path) -> Path:
    result = run_command(toy("--output_dir", "undisturbed"), toy_folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return toy_folder / "undisturbed"


def test_a_kill_and_a_switch(undisturbed: Path) -> None:
    said = check(toy, undisturbed.parent, undisturbed, ["kill", "switch"], seed=1)
    assert "it died at step" in said and "restart 1 of at most 1000" in said


@pytest.mark.slow
def test_a_process_that_hangs_is_named(undisturbed: Path) -> None:
    said = check(toy, undisturbed.parent, undisturbed, ["stop"], seed=2)
    assert "gave no sign for 6 s" in said and "on_train_step" in said  # and its stack


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_faults(undisturbed: Path, seed: int) -> None:
    """Ten faults each."""
    check(toy, undisturbed.parent, undisturbed, random.Random(seed).choices(FAULTS, k=10), seed)


@pytest.fixture(scope="module")
def undisturbed_ranks(toy_folder: Path) -> Path:
    result = run_command(ranks("--output_dir", "four"), toy_folder, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return toy_folder / "four"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_many_faults_of_four_ranks(undisturbed_ranks: Path, seed: int) -> None:
    """Ten each: a rank is killed, in a collective as like as not, or stopped; launcher and run are told to end."""
    check(ranks, undisturbed_ranks.parent, undisturbed_ranks, random.Random(seed).choices(FAULTS, k=10), seed)
