"""Blends of GPTDatasets by weight, and the train/valid/test splits, as megatron-core 0.16.1 draws them."""

import json
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ext.bin_dataset import _index_builder, index_cache
from mindformers_ext.bin_dataset.gpt_dataset import GPTDataset, GPTDatasetConfig, plan_samples
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, idx_path
from mindformers_ext.files import remote

SPLITS = ("train", "valid", "test")
COUNTED = 1 << 18  # samples that are counted together


class BlendedDataset:
    """Samples drawn from several datasets so that each stays closest to its weight at every point.

    ``weights`` with ``size``: that many samples in these proportions. ``size`` None: every dataset gives
    ``weights[i]`` samples, all of them in the end. Raises ValueError where a dataset is asked for more than it has.
    """

    def __init__(
        self, datasets: Sequence[GPTDataset], weights: Sequence[float], size: int | None, config: GPTDatasetConfig
    ) -> None:
        if not datasets or len(datasets) != len(weights) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"a blend needs one positive weight per dataset, got weights {list(weights)}")
        self.datasets = list(datasets)
        self.config = config
        self.split = datasets[0].split
        self.description = {
            "kind": "BlendedDataset",
            "datasets": [dataset.description for dataset in datasets],
            "weights": [float(weight) for weight in weights],
            "size": size,
        }
        self._weights, self._size = np.asarray(weights, np.float64), size
        folder = config.cache_folder(datasets[0].indexed.prefix)
        arrays = index_cache.load_or_build(Path(folder), self.description, self._build_indices)
        self.dataset_index, self.dataset_sample_index = arrays
        self._check_supply()

    def _build_indices(self) -> dict[str, np.ndarray]:
        weights, total = self._weights, self._weights.sum()
        sizes = np.empty(0, np.int64) if self._size is not None else weights.astype(np.int64)
        size = int(total) if self._size is None else self._size
        arrays = _index_builder.build_blend_indices(weights / total, size, sizes)
        return dict(zip(("dataset_index", "dataset_sample_index"), arrays, strict=True))

    def _check_supply(self) -> None:
        drawn = np.zeros(len(self.datasets), np.int64)
        for start in range(0, len(self.dataset_index), COUNTED):  # bincount makes eight bytes of each
            drawn += np.bincount(self.dataset_index[start : start + COUNTED], minlength=len(drawn))
            index_cache.let_go(self.dataset_index)
        for dataset, count in zip(self.datasets, drawn, strict=True):
            if count > len(dataset):
                raise ValueError(
                    f"the {self.split} blend draws {count} samples from {dataset.indexed.prefix}, which was built with "
                    f"{len(dataset)}; raise mid_level_dataset_surplus ({self.config.mid_level_dataset_surplus})"
                )

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a blend of {len(self)}")
        return self.datasets[self.dataset_index[index]][int(self.dataset_sample_index[index])]

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of many samples, as GPTDataset.batch; one read per contributing dataset."""
        indices = np.asarray(indices)
        owners, samples = self.dataset_index[indices], self.dataset_sample_index[indices]
        columns: dict[str, np.ndarray] = {}
        for owner in np.unique(owners):
            rows = np.flatnonzero(owners == owner)
            for name, part in self.datasets[owner].batch(samples[rows]).items():
                if name not in columns:
                    columns[name] = np.empty((len(indices), *part.shape[1:]), part.dtype)
                columns[name][rows] = part
        return columns


Dataset = GPTDataset | BlendedDataset


def build_datasets(
    config: GPTDatasetConfig,
    sizes: Sequence[int | None],
    data_path: str | Sequence[str | float] | None,
    per_split: Sequence[str | Sequence[str | float] | None] = (None, None, None),
    only: int | None = None,
) -> list[Dataset | None]:
    """Train, valid and test datasets (None where the split is empty), each with at least ``sizes[i]`` samples.

    ``data_path`` is a list of prefixes, or of weights and prefixes by turns, cut by ``config.split``; ``per_split``
    gives each split its own list instead. ``only`` builds one of the three.
    """
    return [plan and plan.build() for plan in plan_splits(config, sizes, data_path, per_split, only)]


def plan_splits(
    config: GPTDatasetConfig,
    sizes: Sequence[int | None],
    data_path: str | Sequence[str | float] | None,
    per_split: Sequence[str | Sequence[str | float] | None],
    only: int | None,
) -> list["SplitPlan | None"]:
    """What ``build_datasets`` builds each split of."""
    if len(sizes) != len(SPLITS):
        raise ValueError(f"sizes needs a number of samples for train, valid and test, got {list(sizes)}")
    if (data_path is None) == all(blend is None for blend in per_split):
        raise ValueError("give data_path, or train_data_path / valid_data_path / test_data_path, and not both")
    own_list = data_path is None
    blends = per_split if own_list else [data_path] * len(SPLITS)
    shares = [(0.0, 1.0)] * len(SPLITS) if own_list else split_ranges(config.split)
    return [
        SplitPlan.of(config, SPLITS[i], blends[i], shares[i], sizes[i], own_list)
        if blends[i] and shares[i] and only in (None, i)
        else None
        for i in range(len(SPLITS))
    ]


@dataclass(frozen=True)
class SplitPlan:
    """What one split is made of."""

    config: GPTDatasetConfig
    split: str  # of SPLITS
    prefixes: list[str]
    weights: list[float] | None  # sum to 1; None: all samples of every prefix
    share: tuple[float, float]  # of the sequences of each prefix
    size: int | None  # samples asked for
    part_sizes: list[int | None]  # samples asked of each prefix
    single: bool = False  # one prefix, not a blend

    @classmethod
    def of(
        cls,
        config: GPTDatasetConfig,
        split: str,
        blend: str | Sequence[str | float],
        share: tuple[float, float],
        size: int | None,
        own_list: bool,
    ) -> "SplitPlan":
        """The plan of a split that has data; ``own_list``: of its own, not a share of everybody's."""
        prefixes, weights = parse_blend(blend)
        # megatron-core ignores the weight of a split's own single prefix, but blends the single prefix of data_path.
        if len(prefixes) == 1 and (weights is None or own_list):
            return cls(config, split, prefixes, None, share, size, [size], single=True)
        if weights is None:
            return cls(config, split, prefixes, None, share, size, [None] * len(prefixes))
        if size is None:
            raise ValueError(f"weights in data_path need a number of samples for {split} in sizes")
        weights = (np.array(weights) / np.sum(weights)).tolist()
        surplus = 1 + config.mid_level_dataset_surplus
        part_sizes = [math.ceil(math.ceil(size * weight) * surplus) for weight in weights]
        return cls(config, split, prefixes, weights, share, size, part_sizes)

    def build(self) -> Dataset:
        """The dataset, its indices built or found in the cache."""

        def build(prefix: str, size: int | None) -> GPTDataset:
            indexed, first, last = _open_part(prefix, self.share, self.config)
            return GPTDataset(indexed, self.config, size, self.split, first, last)

        if self.single:
            return build(self.prefixes[0], self.size)
        with ThreadPoolExecutor(self.config.num_dataset_builder_threads) as pool:
            parts = list(pool.map(build, self.prefixes, self.part_sizes))
        lengths = [len(part) for part in parts]
        size = self._blend_size(lengths)
        if self.weights is None:
            return BlendedDataset(parts, lengths, None if self.size is None else size, self.config)
        return BlendedDataset(parts, self.weights, size, self.config)

    def count(self) -> int:
        """How many samples ``build`` would give, from the lengths alone, and its errors."""
        counts = [
            plan_samples(*_open_part(prefix, self.share, self.config), self.config, size, self.split).samples
            for prefix, size in zip(self.prefixes, self.part_sizes, strict=True)
        ]
        return counts[0] if self.single else self._blend_size(counts)

    def _blend_size(self, lengths: list[int]) -> int:
        """Samples of the blend of parts that have these many."""
        if self.weights is not None:
            return sum(math.ceil(self.size * weight) for weight in self.weights)
        if 0 in lengths:
            empty = self.prefixes[lengths.index(0)]
            raise ValueError(f"the {self.split} split of {empty} has no sample of {self.config.sequence_length} tokens")
        return sum(lengths) if self.size is None else min(self.size, sum(lengths))


def _open_part(prefix: str, share: tuple[float, float], config: GPTDatasetConfig) -> tuple[IndexedDataset, int, int]:
    """A pair, and the first and last of the sequences that belong to a split."""
    indexed = IndexedDataset(prefix, config.s3_cache_path)
    first, last = (round(bound * float(len(indexed))) for bound in share)
    return indexed, first, last


def split_ranges(split: str) -> list[tuple[float, float] | None]:
    """``"98, 1, 1"`` as the part of the sequences each split owns, None for an empty one."""
    words = re.split(r"[,;:/\s]+", split.strip().strip("[]()"))
    numbers = [word for word in words if re.fullmatch(r"\d+\.?\d*|\.\d+", word)]
    shares = [float(number) for number in numbers]
    # megatron-core takes every number it finds: the -1 of "98, -1, 1" for 1, and 1e-3 for two shares.
    if len(numbers) < len(words) or not 1 <= len(shares) <= len(SPLITS) or not 0 < sum(shares) < math.inf:
        raise ValueError(f"split must be one to three shares such as '98, 1, 1', got {split!r}")
    shares += [0.0] * (len(SPLITS) - len(shares))
    bounds = [0.0]
    for share in (np.array(shares) / np.sum(shares)).tolist():
        bounds.append(bounds[-1] + share)
    return [None if low >= high else (low, high) for low, high in zip(bounds, bounds[1:], strict=False)]


def parse_blend(paths: str | Sequence[str | float]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of ``["30", "a", "70", "b"]``, or prefixes and None of ``["a", "b"]``.

    One text is a prefix, the JSON file of merge_bin.py --blend or, as on Megatron's command line, all of these words
    apart. Weights are above 0.
    """
    if isinstance(paths, str) and paths.endswith(".json"):  # of merge_bin.py --blend
        paths = json.loads(remote.read_text(paths))["data_path"]
    elif isinstance(paths, str):
        paths = [paths] if idx_path(paths).is_file() else paths.split()
    items = [str(path).strip() for path in paths]
    if not items:
        raise ValueError("data_path is empty; give prefixes, or weights and prefixes by turns")
    numbers = [_as_number(item) for item in items[::2]]
    if len(items) % 2 or all(number is None for number in numbers):
        return items, None
    if None in numbers:
        raise ValueError(f"data_path mixes weighted and unweighted prefixes: {items}")
    for prefix, number in zip(items[1::2], numbers, strict=True):
        if not 0 < number < math.inf:
            raise ValueError(f"data_path gives {prefix} the weight {number:g}; weights must be numbers above 0")
    if math.isinf(sum(numbers)):
        raise ValueError(f"the weights in data_path sum to more than a number can hold: {items}")
    return items[1::2], numbers


def _as_number(item: str) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None
