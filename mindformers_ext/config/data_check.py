"""Check what a YAML's data section asks for, and the files that it points to, before anything is built."""

from pathlib import Path

from tokenizers import Tokenizer

from mindformers_ext.bin_dataset.blended_dataset import parse_blend
from mindformers_ext.bin_dataset.gpt_dataset import open_loss_mask
from mindformers_ext.bin_dataset.indexed_dataset import (
    CorruptDatasetError,
    IndexedDataset,
    ids_of_tokenizer,
    manifest_of,
)
from mindformers_ext.bin_dataset.loader_config import LoaderConfig
from mindformers_ext.bin_dataset.token_range import token_range
from mindformers_ext.bin_dataset.tokenizer import load_reference
from mindformers_ext.bin_dataset.tokenizer_files import TokenizerError, find_tokenizer
from mindformers_ext.config.run import Run
from mindformers_ext.errors import ConfigError
from mindformers_ext.files import remote


def check_data(run: Run, dataset: str) -> None:
    """Read a Megatron dataset section as the loader will, open every file and compare it with the model's sizes.

    Raises:
        ConfigError: a key or value that cannot work, a missing or damaged file, fewer tokens than a sample or fewer
            samples than a batch, or an id outside the vocabulary.
    """
    section = getattr(run.sections, dataset)
    if section is None or section.megatron is None:
        return
    path, name, config = run.path, f"{dataset}.data_loader.config", section.megatron.config
    asked = read_loader(run, dataset)
    check_tokenizer(run)
    vocab_size = run.value("model.model_config.vocab_size")
    try:
        paths = asked.data_paths()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {name}.conversations: {error}") from None
    for key, given in paths.items():
        if not given:
            continue
        cache, where = asked.samples.s3_cache_path, f"{name}.{key}"
        files = [open_dataset(prefix, where, path, cache) for prefix in parse_blend(given)[0]]
        tokens = sum(len(file.tokens) for file in files)
        if tokens < config.seq_length + 1:
            raise ConfigError(
                f"{path}: {name}.seq_length is {config.seq_length}, but {key} {given} holds only {tokens} tokens and a "
                "sample needs seq_length + 1; give more text or a shorter sequence"
            )
        for file in files:
            if remote.is_remote(file.prefix):
                check_manifest(file, vocab_size, f"{name}.{key}", path)
                continue
            check_ids(file, vocab_size, asked.samples.path_to_cache, f"{name}.{key}", path)
    check_samples(asked, run, dataset)


def read_loader(run: Run, dataset: str) -> LoaderConfig:
    """The `data_loader` section as the loader reads it."""
    loader = run.value(f"{dataset}.data_loader")
    try:
        asked = LoaderConfig.of(
            loader.get("datasets_type", "GPTDataset"),
            loader["sizes"],
            loader["config"],
            loader.get("shuffle", False),
            loader.get("phase", "train"),
        )
        for given in asked.paths.values():
            if given:
                parse_blend(given)
        return asked
    except ValueError as error:
        raise ConfigError(f"{run.path}: {dataset}.data_loader: {error}") from None


def open_dataset(prefix: str, key: str, path: str | Path, cache: str | None = None) -> IndexedDataset:
    """Open one .bin/.idx pair, and the loss mask beside it."""
    try:
        file = IndexedDataset(prefix, cache)
        if file.dtype.kind not in "iu":
            raise ValueError(f"holds {file.dtype.name}, but training samples need integer tokens")
        open_loss_mask(file, cache)
        return file
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {key} {prefix!r}: {error}") from None


def check_ids(file: IndexedDataset, vocab_size: int | None, cache: str | None, key: str, path: str | Path) -> None:
    """Compare every token id of a file with the size of the vocabulary, and check its index.

    A file is read once, then remembered.
    """
    try:
        low, high = token_range(file, cache)
    except CorruptDatasetError as error:
        raise ConfigError(f"{path}: {key} {file.prefix!r}: {error}") from None
    if low < 0:
        raise ConfigError(
            f"{path}: {key} {file.prefix!r} holds token id {low} ({file.place_of(low)}), and ids are never negative; "
            "make the data again"
        )
    if vocab_size is not None and high >= vocab_size:
        raise ConfigError(
            f"{path}: model.model_config.vocab_size is {vocab_size}, but {key} {file.prefix!r} holds token id {high} "
            f"({file.place_of(high)}); set vocab_size to the tokenizer's, or make the data with the right tokenizer"
        )


def check_manifest(file: IndexedDataset, vocab_size: int | None, key: str, path: str | Path) -> None:
    """Compare what the tools wrote beside tokens on an object store: to look at the ids would read them all."""
    ids = ids_of_tokenizer(manifest_of(file.prefix))
    if vocab_size is not None and ids > vocab_size:
        raise ConfigError(
            f"{path}: model.model_config.vocab_size is {vocab_size}, but {key} {file.prefix!r} was made with a "
            f"tokenizer of {ids} ids; set vocab_size to at least that, or make the data with the right tokenizer"
        )


def check_samples(asked: LoaderConfig, run: Run, dataset: str) -> None:
    """Compare the samples there are with those asked for, and with the batch."""
    try:
        samples = asked.count()
    except ValueError as error:
        raise ConfigError(f"{run.path}: {dataset}.data_loader: {error}") from None
    batch = run.global_batch if run.trains else run.batch_size
    if samples < batch and run.value(f"{dataset}.drop_remainder") is not False:
        raise ConfigError(
            f"{run.path}: {dataset}.data_loader.sizes {list(asked.sizes)} gives {samples} samples, but a step takes "
            f"{batch} (runner_config.batch_size {run.batch_size}, data_parallel {run.dp}, micro-batches "
            f"{run.micro_batches}); raise sizes"
        )


def check_tokenizer(run: Run) -> Tokenizer | None:
    """Load processor.tokenizer.tokenizer_file and compare it with vocab_size; None when the YAML names none.

    It encodes whole texts, whatever the file was saved with.

    Raises:
        ConfigError: the file is missing, is neither a tokenizer.json nor tiktoken's, or has more tokens than the model.
    """
    path, processor = run.path, run.sections.processor
    file = processor and processor.tokenizer and processor.tokenizer.tokenizer_file
    if file is None:
        return None
    if not Path(file).is_file():
        raise ConfigError(f"{path}: processor.tokenizer.tokenizer_file is {file!r}, which does not exist")
    try:
        tokenizer, _ = load_reference(find_tokenizer(file))
    except TokenizerError as error:
        raise ConfigError(f"{path}: processor.tokenizer.tokenizer_file: {error}") from None
    vocab_size = run.value("model.model_config.vocab_size")
    if vocab_size is not None and tokenizer.get_vocab_size() > vocab_size:
        raise ConfigError(
            f"{path}: model.model_config.vocab_size is {vocab_size}, but processor.tokenizer.tokenizer_file {file!r} "
            f"has {tokenizer.get_vocab_size()} tokens; set vocab_size to at least that"
        )
    return tokenizer
