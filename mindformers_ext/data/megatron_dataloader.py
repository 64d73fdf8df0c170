"""The YAML word ``BlendedMegatronDatasetDataLoader``, read with our datasets.

Takes the place of mindformers/dataset/dataloader/blended_megatron_dataloader.py (MindFormers 1.9.0), which compiles
its helpers with `make` at the first run, needs a barrier between ranks, ignores unknown keys and reads one sample at a
time in Python. It can go when MindFormers reads samples in megatron-core 0.16.1's order from a pip-built extension.
"""

from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.dataset.dataloader.utils import is_dataset_built_on_rank
from mindformers.tools.logger import logger
from mindformers.tools.register.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_real_group_size, get_real_rank
from mindspore.dataset import GeneratorDataset

from mindformers_ext.bin_dataset.blended_dataset import Dataset
from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig
from mindformers_ext.bin_dataset.loader_config import LoaderConfig
from mindformers_ext.bin_dataset.sample_order import LeftOut
from mindformers_ext.errors import ConfigError

COLUMNS = ("input_ids", "labels", "loss_mask", "position_ids", "attention_mask", "actual_seq_len")


class SampleSource:
    """Random-access rows for GeneratorDataset: the asked columns, int32, from the ``start``-th sample that is read on.

    GeneratorDataset asks for one row after another, every ``stride``-th one. A row that is not at hand is read in one
    batch with the rows that follow it, as many as READ_AHEAD bytes hold.
    """

    READ_AHEAD = 4 << 20

    def __init__(self, dataset: Dataset, columns: list[str], start: int, left_out: LeftOut, stride: int = 1) -> None:
        self.dataset = dataset
        self.columns = columns
        self.start = start
        self.left_out = left_out
        self._stride = stride
        self._count = 1  # rows of a batch, known after the first one
        self._first, self._batch = 0, tuple(np.empty((0, 0), np.int32) for _ in columns)

    def __len__(self) -> int:
        return self.left_out.kept - self.start

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        row, between = divmod(int(index) - self._first, self._stride)
        if between or not 0 <= row < len(self._batch[0]):
            self._read(int(index))
            row = 0
        return tuple(column[row] for column in self._batch)

    def _read(self, index: int) -> None:
        rows = range(index, len(self), self._stride)[: self._count] or [index]
        batch = self.dataset.batch(self.left_out.places(self.start + np.array(rows)))
        self._batch = tuple(np.ascontiguousarray(batch[name], np.int32) for name in self.columns)
        self._first = index
        self._count = max(1, self.READ_AHEAD * len(rows) // sum(column.nbytes for column in self._batch))


class EmptySource:
    """Rows of ones in the shape of the real ones, for ranks that get their data by broadcast."""

    def __init__(self, config: GPTDatasetConfig, columns: list[str], start: int, left_out: LeftOut) -> None:
        length = config.sequence_length
        shapes = {"attention_mask": (1, length, length), "actual_seq_len": (config.eod_pad_length,)}
        self._row = tuple(np.ones(shapes.get(name, (length,)), np.int32) for name in columns)
        self.start, self.left_out = start, left_out

    def __len__(self) -> int:
        return self.left_out.kept - self.start

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        return self._row


@MindFormerRegister.register(MindFormerModuleType.DATASET_LOADER)
class BlendedMegatronDatasetDataLoader:
    """Build MindSpore's dataset over Megatron .bin/.idx files from the YAML's ``train_dataset.data_loader``."""

    def __new__(
        cls,
        datasets_type: str,
        sizes: list[int | None],
        config: dict[str, Any],
        column_names: list[str] | None = None,
        shuffle: bool = False,
        num_shards: int | None = None,
        shard_id: int | None = None,
        phase: str = "train",
        first_sample: int = 0,
        leave_out: Sequence[Sequence[int]] = (),
        **mindformers_options: Any,
    ) -> GeneratorDataset:
        """Samples of one split, sharded by data-parallel rank (sample i goes to shard i % num_shards).

        Args:
            datasets_type: "GPTDataset".
            sizes: samples of the train, valid and test split.
            config: see GPTDatasetConfig, in MindFormers' words, and the data paths.
            column_names: which of COLUMNS, in this order; default input_ids alone.
            shuffle: must be False, the samples are shuffled by ``config.random_seed``.
            first_sample: how many of the samples that are read to pass over.
            leave_out: ranges [first, one after the last] of samples of the order that are not read.
            mindformers_options: what CausalLanguageModelDataset passes to every loader (workers, batch size).

        Raises:
            ConfigError: a key, a value or a file that cannot be used.
        """
        try:
            asked = LoaderConfig.of(datasets_type, sizes, config, shuffle, phase)
            columns = _check_columns(list(column_names or ["input_ids"]), asked.samples)
            source = _build_source(asked, columns, first_sample, leave_out, num_shards or 1)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(f"data_loader: {error}") from error
        return GeneratorDataset(source, column_names=columns, shuffle=False, num_shards=num_shards, shard_id=shard_id)


def _check_columns(columns: list[str], config: GPTDatasetConfig) -> list[str]:
    missing = set(columns) - set(COLUMNS[:4])
    if config.create_attention_mask:
        missing.discard("attention_mask")
    if config.create_compressed_eod_mask:
        missing.discard("actual_seq_len")
    if missing:
        raise ValueError(
            f"input_columns asks for {sorted(missing)}; the loader has {', '.join(COLUMNS[:4])}, "
            "attention_mask with create_attention_mask and actual_seq_len with create_compressed_eod_mask"
        )
    return columns


def _build_source(
    asked: LoaderConfig, columns: list[str], first_sample: int, leave_out: Sequence[Sequence[int]], stride: int
) -> SampleSource | EmptySource:
    length = asked.samples.sequence_length
    if not _reads_data():
        if asked.wanted is None:
            raise ValueError(f"sizes[{asked.split}] must be a number when data is broadcast between ranks")
        logger.info("rank %s gets its data by broadcast and builds no dataset", get_real_rank())
        return EmptySource(asked.samples, columns, first_sample, LeftOut(leave_out, asked.wanted))
    dataset = asked.build()
    left_out = LeftOut(leave_out, asked.size_of(len(dataset)))
    if not 0 <= first_sample < left_out.kept:
        raise ValueError(f"first_sample is {first_sample}, but must lie in the {left_out.kept} samples to read")
    logger.info("dataset of %d samples of %d tokens", left_out.kept - first_sample, length)
    return SampleSource(dataset, columns, first_sample, left_out, stride)


def _reads_data() -> bool:
    """Whether this rank reads files: dataset_broadcast_opt_level (parallel_speed_up.json) lets others go without."""
    strategy = ms.get_auto_parallel_context("dataset_strategy")
    if get_real_group_size() == 1 or not isinstance(strategy, list | tuple):
        return True
    return is_dataset_built_on_rank()
