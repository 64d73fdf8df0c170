"""Check the files that a YAML points to before anything is built: training data and tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mindformers_ext.bin_dataset.indexed_dataset import CorruptDatasetError, IndexedDataset
from mindformers_ext.config.run import Run
from mindformers_ext.errors import ConfigError

SAMPLED_TOKENS = 1_000_000  # tokens of every file whose ids are compared with vocab_size


def data_prefixes(data_path: Any) -> list[str]:
    """The prefixes of a `data_path`: one text, a list of prefixes, or a list of weights and prefixes in turn."""
    items = [data_path] if isinstance(data_path, str) else list(data_path or [])
    weighted = len(items) % 2 == 0 and all(is_weight(item) for item in items[::2])
    return [str(item) for item in (items[1::2] if weighted else items)]


def is_weight(item: Any) -> bool:
    """True for a number, or a text that reads as one."""
    try:
        float(item)
    except (TypeError, ValueError):
        return False
    return True


def check_data(run: Run, dataset: str) -> None:
    """Open every file of a Megatron dataset section and compare it with the model's sizes.

    Raises:
        ConfigError: a missing or damaged file, too few tokens for one sample, or an id outside the vocabulary.
    """
    section = getattr(run.sections, dataset)
    if section is None or section.megatron is None:
        return
    path, name, config = run.path, f"{dataset}.data_loader.config", section.megatron.config
    if not config.paths:
        raise ConfigError(f"{path}: {name}.data_path is missing; give the prefix of a .bin/.idx pair")
    check_tokenizer(run)
    vocab_size = run.value("model.model_config.vocab_size")
    for key, given in config.paths.items():
        files = [open_dataset(prefix, f"{name}.{key}", path) for prefix in data_prefixes(given)]
        tokens = sum(len(file.tokens) for file in files)
        if tokens < config.seq_length + 1:
            raise ConfigError(
                f"{path}: {name}.seq_length is {config.seq_length}, but {key} {given} holds only {tokens} tokens and a "
                "sample needs seq_length + 1; give more text or a shorter sequence"
            )
        for file in files:
            check_ids(file, vocab_size, f"{name}.{key}", path)


def open_dataset(prefix: str, key: str, path: str | Path) -> IndexedDataset:
    """Open one .bin/.idx pair."""
    try:
        return IndexedDataset(prefix)
    except (FileNotFoundError, CorruptDatasetError) as error:
        raise ConfigError(f"{path}: {key} {prefix!r}: {error}") from None


def check_ids(file: IndexedDataset, vocab_size: int | None, key: str, path: str | Path) -> None:
    """Compare the first token ids of a file with the size of the vocabulary."""
    highest = int(np.max(file.tokens[:SAMPLED_TOKENS], initial=0))
    if vocab_size is not None and highest >= vocab_size:
        raise ConfigError(
            f"{path}: model.model_config.vocab_size is {vocab_size}, but {key} {file.prefix!r} holds token id "
            f"{highest}; set vocab_size to the tokenizer's, or make the data with the right tokenizer"
        )


def check_tokenizer(run: Run) -> Tokenizer | None:
    """Load processor.tokenizer.tokenizer_file and compare it with vocab_size; None when the YAML names none.

    Raises:
        ConfigError: the file is missing, is not a tokenizer.json, or has more tokens than the model.
    """
    path, processor = run.path, run.sections.processor
    file = processor and processor.tokenizer and processor.tokenizer.tokenizer_file
    if file is None:
        return None
    if not Path(file).is_file():
        raise ConfigError(f"{path}: processor.tokenizer.tokenizer_file is {file!r}, which does not exist")
    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"{path}: processor.tokenizer.tokenizer_file {file!r} is not a tokenizer.json: {error}"
        ) from None
    vocab_size = run.value("model.model_config.vocab_size")
    if vocab_size is not None and tokenizer.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"{path}: model.model_config.vocab_size is {vocab_size}, but processor.tokenizer.tokenizer_file {file!r} "
            f"has {tokenizer.get_vocab_size()} tokens; set vocab_size to at least that"
        )
    return tokenizer
