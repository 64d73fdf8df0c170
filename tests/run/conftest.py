"""Toy data, and run_mindformer.py as a user starts it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOY = Path(__file__).resolve().parent / "toy"
WITHOUT_TORCH = Path(__file__).resolve().parent / "without_torch"


def run_environment() -> dict[str, str]:
    """Of a run: one thread, this Python first in PATH, no torch."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    folders = os.pathsep.join([str(WITHOUT_TORCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ, PATH=path, PYTHONPATH=folders, OMP_NUM_THREADS="1", GLOG_v="3")


def run_command(arguments: list[str], folder: Path, timeout: int = 240) -> subprocess.CompletedProcess:
    """Run a command in a folder, in `run_environment`."""
    return subprocess.run(arguments, cwd=folder, env=run_environment(), capture_output=True, text=True, timeout=timeout)


def run_mindformer(folder: Path, *arguments: str, config: Path = TOY / "train_toy.yaml") -> subprocess.CompletedProcess:
    """Run run_mindformer.py with the toy model."""
    command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(config), "--register_path", str(TOY)]
    return run_command([*command, *arguments], folder)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 1,000 random tokens below 64 as Megatron files, and a tokenizer.json of 64 letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter

    folder = tmp_path_factory.mktemp("toy")
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "toy_text_document", np.uint16) as writer:
        for _ in range(20):
            writer.add_document(rng.integers(0, 64, 50))
    letters = {chr(ord("0") + i): i for i in range(64)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def trained(toy_folder: Path) -> Path:
    """The output folder of 16 steps of the toy model, checkpoints at 4, 8, 12 and 16."""
    result = run_mindformer(toy_folder, "--output_dir", "straight", "--runner_config.epochs", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    return toy_folder / "straight"
