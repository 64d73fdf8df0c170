"""A run that was stopped, also by kill -9 at any moment, and resumed gives bit for bit what an unbroken run gives."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import ROOT, TOY, run_command, run_environment, run_mindformer
from helpers.small_yaml import small_sizes
from safetensors.numpy import load_file, save_file

from mindformers_ext.config.run import Run, read_run
from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.audit import differences, verify_all
from mindformers_ext.sharded_checkpoint.reader import open_source
from mindformers_ext.training.run_modes import find_checkpoint

EXACT = ("loss", "main_loss", "grad_norm", "lr", "expert_load")


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check_same_steps(folder: Path, reference: Path) -> list[int]:
    """Every recorded step equals the reference's; returns the steps."""
    expected = {record["step"]: record for record in metrics(reference)}
    found = metrics(folder)
    for record in found:
        for key in EXACT:
            assert record[key] == expected[record["step"]][key], (record["step"], key)
    return [record["step"] for record in found]


def resume(toy_folder: Path, output: str, location: str, *arguments: str, step: str = "True"):
    return run_mindformer(
        toy_folder, "--output_dir", output, "--load_checkpoint", location, "--resume_training", step, *arguments
    )


# In the middle of the first and of the second pass over the data.
@pytest.mark.parametrize("step", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_resumed_run_equals_the_straight_one(trained: Path, toy_folder: Path, step: int) -> None:
    """Losses, every parameter of the last checkpoint, and its random state."""
    output = f"resumed_{step}"
    result = resume(toy_folder, output, "straight/checkpoint", "--runner_config.epochs", "2", step=f"step_{step:06d}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert check_same_steps(toy_folder / output, trained) == list(range(step + 1, 17))
    ends = [open_source(folder / "checkpoint") for folder in (trained, toy_folder / output)]
    assert not list(differences(*ends))
    assert ends[0].meta == ends[1].meta and ends[0].private(0) == ends[1].private(0)


@pytest.mark.slow
def test_weights_alone_start_a_new_training(trained: Path, toy_folder: Path) -> None:
    """Without resume_training, here from a plain file: its weights, a new optimizer, the data from its start."""
    tensors = load_file(trained / "checkpoint/step_000016/rank_0000.safetensors")
    save_file({name: tensors[name] for name in tensors if "adam" not in name}, toy_folder / "plain.safetensors")
    result = run_mindformer(toy_folder, "--output_dir", "new", "--load_checkpoint", "plain.safetensors")
    assert result.returncode == 0, result.stderr[-3000:]
    found, before = metrics(toy_folder / "new"), metrics(trained)
    assert [record["step"] for record in found] == list(range(1, 9))
    assert found[0]["lr"] == 0 and found[0]["expert_load"] == before[0]["expert_load"]  # the same first batch
    assert found[0]["loss"] < before[0]["loss"] - 0.05
    assert int(open_source(toy_folder / "new/checkpoint").read("global_step")[0]) == 8


@pytest.mark.slow
def test_another_batch_size_goes_on_at_the_same_sample(trained: Path, toy_folder: Path) -> None:
    """After 4 steps of 4 samples, batches of 3: the next one holds samples 16, 17 and 18, whatever came before."""
    arguments = ["--runner_config.batch_size", "3", "--callbacks.0.save_checkpoint_steps", "2"]
    result = resume(toy_folder, "batch", "straight/checkpoint", *arguments, step="step_000004")
    assert result.returncode == 0, result.stderr[-3000:]
    records = metrics(toy_folder / "batch")
    assert [record["step"] for record in records] == [5, 6, 7, 8, 9]  # 16 samples are left: five batches
    expected = sample_loads(toy_folder)
    for index, record in enumerate(records):
        load = expected[16 + 3 * index : 19 + 3 * index].sum(0)
        assert record["expert_load"]["toy"]["max"] == load.max()
        assert record["expert_load"]["toy"]["min"] == load.min()
    meta = open_source(toy_folder / "batch/checkpoint", "step_000006").meta
    assert (meta.epoch, meta.consumed_samples) == (0, 22)


def sample_loads(toy_folder: Path) -> np.ndarray:
    """Tokens per expert of every training sample, (32, 4), in the order of the data."""
    from mindformers_ext.bin_dataset.blended_dataset import build_datasets
    from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig

    config = GPTDatasetConfig(random_seed=1234, sequence_length=16, split="1, 0, 0", create_attention_mask=False)
    dataset = build_datasets(config, [32, None, None], ["1", str(toy_folder / "toy_text_document")])[0]
    return np.stack([np.bincount(np.asarray(dataset[i]["input_ids"]) % 4, minlength=4) for i in range(32)])


REFUSED = [
    pytest.param(["--model.model_config.vocab_size", "128"], "is of a model with vocab_size 64, not 128", id="model"),
    pytest.param(
        ["--train_dataset.data_loader.config.random_seed", "7"],
        "stands at sample 16 of other data",
        id="data",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        ["--runner_config.epochs", "1"],
        "has trained 16 of the 8 steps that runner_config.epochs 1 asks for",
        id="nothing left",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("arguments,words", REFUSED)
def test_what_does_not_fit_is_one_sentence(trained: Path, toy_folder: Path, arguments: list[str], words: str) -> None:
    step = "step_000016" if "epochs" in words else "step_000004"
    result = resume(toy_folder, "refused", "straight/checkpoint", "--runner_config.epochs", "2", *arguments, step=step)
    assert result.returncode == 2, result.stderr[-2000:]
    assert words in result.stderr.strip().splitlines()[-1]
    assert not (toy_folder / "refused/checkpoint/latest").exists()


def test_what_cannot_be_resumed(trained: Path, toy_folder: Path) -> None:
    def run(source: Path, resume: bool | str) -> Run:
        return read_run(TOY / "train_toy.yaml", None, [("load_checkpoint", str(source)), ("resume_training", resume)])

    with pytest.raises(ConfigError, match="y.yaml: .* has no checkpoint 'step_000099', only step_000004, step_000008"):
        find_checkpoint(run(toy_folder / "straight/checkpoint", "step_000099"))
    plain = toy_folder / "one.safetensors"
    save_file({"w": np.zeros(2)}, plain)
    with pytest.raises(ConfigError, match="holds weights only; set it to False"):
        find_checkpoint(run(plain, True))


SHORT = ["--runner_config.epochs", "2"]
LONG = ["--runner_config.epochs", "40", "--callbacks.0.save_checkpoint_steps", "3", "--callbacks.0.async_save", "True"]


def toy_command(*arguments: str) -> list[str]:
    """A run of the toy in one process."""
    command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(TOY / "train_toy.yaml")]
    return [*command, "--register_path", str(TOY), *arguments]


def kill_and_resume(
    command: Callable[..., list[str]], options: list[str], reference: Path, name: str, kills: int, longest: float
) -> None:
    """Kill a run again and again at random moments after it began to train, go on each time, compare with `reference`.

    `command(*arguments)` starts a run. `longest` seconds pass at most between the start of a training and its kill.
    The last run ends by itself.
    """
    folder, output = reference.parent, reference.parent / name
    moments = random.Random(kills)
    for last in [False] * kills + [True]:
        go_on = []
        if (output / "checkpoint/latest").exists():
            verify_all(open_source(output / "checkpoint"))
            go_on = ["--load_checkpoint", f"{name}/checkpoint", "--resume_training", "True"]
        arguments = command("--output_dir", name, *options, *go_on)
        if not last:
            kill_after_start(arguments, folder, output, moments.uniform(0, longest))
    result = run_command(arguments, folder, timeout=900)
    nothing_left = result.returncode == 2 and "has trained" in result.stderr  # the last kill came too late
    assert nothing_left or result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert check_same_steps(output, reference) == [record["step"] for record in metrics(reference)]
    assert not list(differences(open_source(output / "checkpoint"), open_source(reference / "checkpoint")))


def kill_after_start(command: list[str], folder: Path, output: Path, seconds: float) -> None:
    """Start a run, wait until it has trained a step, and SIGKILL it `seconds` later (it may have ended before)."""
    start = open_source(output / "checkpoint").meta.step if (output / "checkpoint/latest").exists() else 0
    before = changed_at(output / "metrics.jsonl")
    with open(folder / "killed.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=run_environment(), stdout=log, stderr=log)
    deadline = time.monotonic() + 600
    while process.poll() is None:
        if changed_at(output / "metrics.jsonl") != before and len(metrics(output)) > start:
            break
        assert time.monotonic() < deadline, "the run does not train"
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()


def changed_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@pytest.mark.slow
def test_killed_run_equals_the_unbroken_one(trained: Path) -> None:
    kill_and_resume(toy_command, SHORT, trained, "killed", kills=1, longest=0.3)


@pytest.mark.slow
def test_twenty_kills(toy_folder: Path) -> None:
    result = run_mindformer(toy_folder, "--output_dir", "unbroken", *LONG)
    assert result.returncode == 0, result.stderr[-3000:]
    kill_and_resume(toy_command, LONG, toy_folder / "unbroken", "killed_often", kills=20, longest=1.5)


TINY = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny_8p.yaml"
SMALL = small_sizes(16) | {
    "parallel_config.pipeline_stage": 1,
    "model.model_config.intermediate_size": 64,
    "eval_dataset.data_loader.config.seq_length": 16,
    "train_dataset.data_loader.config.data_path": "['1','toy_text_document']",
    "train_dataset.data_loader.sizes": "[160,0,0]",  # 80 steps
    "processor.tokenizer.tokenizer_file": "tokenizer.json",
    "callbacks.2.save_checkpoint_steps": 2,
}


def four_ranks(*arguments: str) -> list[str]:
    """DeepSeek-V3 in small over four ranks (dp2 mp2 ep2, optimizer and sequence parallel), each a process on CPU."""
    words = [f"run_mindformer.py --config {TINY}", *(f"--{key} {value}" for key, value in SMALL.items()), *arguments]
    output = arguments[arguments.index("--output_dir") + 1]
    launcher = ["bash", str(ROOT / "scripts/msrun_launcher.sh"), " ".join(words), "4", "4", "127.0.0.1", "18348", "0"]
    return [*launcher, f"{output}/log", "True", "600"]


@pytest.mark.slow
def test_twenty_kills_of_four_ranks(toy_folder: Path) -> None:
    """The launcher is killed, and the ranks with it."""
    reference = toy_folder / "ranks"
    result = run_command(four_ranks("--output_dir", "ranks"), toy_folder, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    shutil.copytree(reference / "compiled_ranks", toy_folder / "ranks_killed/compiled_ranks")
    kill_and_resume(four_ranks, [], reference, "ranks_killed", kills=20, longest=0.1)
