"""Blends of GPTDatasets by weight, and the train/valid/test splits, as megatron-core 0.16.1 draws them."""

import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mindformers_ext.bin_dataset import _index_builder, index_cache
from mindformers_ext.bin_dataset.gpt_dataset import GPTDataset, GPTDatasetConfig
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset

SPLITS = ("train", "valid", "test")


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
        folder = config.path_to_cache or f"{datasets[0].indexed.prefix}.index_cache"
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
        drawn = np.bincount(self.dataset_index, minlength=len(self.datasets))
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
    data_path: Sequence[str | float] | None,
    per_split: Sequence[Sequence[str | float] | None] = (None, None, None),
    only: int | None = None,
) -> list[Dataset | None]:
    """Train, valid and test datasets (None where the split is empty), each with at least ``sizes[i]`` samples.

    ``data_path`` is a list of prefixes, or of weights and prefixes by turns, cut by ``config.split``; ``per_split``
    gives each split its own list instead. ``only`` builds one of the three.
    """
    if len(sizes) != len(SPLITS):
        raise ValueError(f"sizes needs a number of samples for train, valid and test, got {list(sizes)}")
    if (data_path is None) == all(blend is None for blend in per_split):
        raise ValueError("give data_path, or train_data_path / valid_data_path / test_data_path, and not both")
    own_list = data_path is None
    blends = per_split if own_list else [data_path] * len(SPLITS)
    shares = [(0.0, 1.0)] * len(SPLITS) if own_list else split_ranges(config.split)
    return [
        _build_split(config, SPLITS[i], parse_blend(blends[i]), shares[i], sizes[i], own_list)
        if blends[i] and shares[i] and only in (None, i)
        else None
        for i in range(len(SPLITS))
    ]


def _build_split(
    config: GPTDatasetConfig,
    split: str,
    blend: tuple[list[str], list[float] | None],
    share: tuple[float, float],
    size: int | None,
    own_list: bool,
) -> Dataset:
    prefixes, weights = blend
    # megatron-core ignores the weight of a split's own single prefix, but blends the single prefix of data_path.
    if len(prefixes) == 1 and (weights is None or own_list):
        return _build_part(config, split, prefixes[0], share, size)
    if weights is None:
        parts = _build_parts(config, split, prefixes, share, [None] * len(prefixes))
        lengths = [len(part) for part in parts]
        if 0 in lengths:
            empty = prefixes[lengths.index(0)]
            raise ValueError(f"the {split} split of {empty} has no sample of {config.sequence_length} tokens")
        return BlendedDataset(parts, lengths, None if size is None else min(size, sum(lengths)), config)
    if size is None:
        raise ValueError(f"weights in data_path need a number of samples for {split} in sizes")
    weights = (np.array(weights) / np.sum(weights)).tolist()
    targets = [math.ceil(size * weight) for weight in weights]
    surplus = 1 + config.mid_level_dataset_surplus
    parts = _build_parts(config, split, prefixes, share, [math.ceil(target * surplus) for target in targets])
    return BlendedDataset(parts, weights, sum(targets), config)


def _build_parts(
    config: GPTDatasetConfig,
    split: str,
    prefixes: list[str],
    share: tuple[float, float],
    sizes: Sequence[int | None],
) -> list[GPTDataset]:
    with ThreadPoolExecutor(config.num_dataset_builder_threads) as pool:
        return list(
            pool.map(
                lambda part: _build_part(config, split, part[0], share, part[1]), zip(prefixes, sizes, strict=False)
            )
        )


def _build_part(
    config: GPTDatasetConfig, split: str, prefix: str, share: tuple[float, float], size: int | None
) -> GPTDataset:
    indexed = IndexedDataset(prefix)
    first, last = (round(bound * float(len(indexed))) for bound in share)
    return GPTDataset(indexed, config, size, split, first, last)


def split_ranges(split: str) -> list[tuple[float, float] | None]:
    """``"98, 1, 1"`` as the part of the sequences each split owns, None for an empty one."""
    shares = [float(number) for number in re.findall(r"[.0-9]+", split)]
    if not 1 <= len(shares) <= len(SPLITS) or sum(shares) <= 0:
        raise ValueError(f"split must be one to three shares such as '98, 1, 1', got {split!r}")
    shares += [0.0] * (len(SPLITS) - len(shares))
    bounds = [0.0]
    for share in (np.array(shares) / np.sum(shares)).tolist():
        bounds.append(bounds[-1] + share)
    return [None if low >= high else (low, high) for low, high in zip(bounds, bounds[1:], strict=False)]


def parse_blend(paths: Sequence[str | float]) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of ``["30", "a", "70", "b"]``, or prefixes and None of ``["a", "b"]``."""
    items = [str(path).strip() for path in paths]
    if not items:
        raise ValueError("data_path is empty; give prefixes, or weights and prefixes by turns")
    numbers = [_as_number(item) for item in items[::2]]
    if len(items) % 2 or all(number is None for number in numbers):
        return items, None
    if None in numbers:
        raise ValueError(f"data_path mixes weighted and unweighted prefixes: {items}")
    for number, item, prefix in zip(numbers, items[::2], items[1::2], strict=True):
        if not 0 < number < math.inf:
            raise ValueError(f"weight '{item}' in data_path of prefix {prefix} must be a positive number")
    return items[1::2], numbers


def _as_number(item: str) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None
