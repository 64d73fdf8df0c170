"""The lowest and highest token id of a .bin file; both files are read whole once, and the answer is remembered."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mindformers_ext.bin_dataset import index_cache
from mindformers_ext.bin_dataset.gpt_dataset import usable_cores
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, bin_path, idx_path

PIECE = 1 << 18  # tokens looked at together: they stay in the cores' own cache between minimum and maximum
STRETCH = 1 << 28  # tokens between two updates of the progress bar
SECONDS_WITHOUT_BAR = 2


def token_range(dataset: IndexedDataset, cache: str | None = None) -> tuple[int, int]:
    """Lowest and highest id of a dataset of integers; (0, 0) if it is empty.

    All tokens are read, as fast as memory or the disk gives them, and the answer is kept in the index cache until the
    size or a time of either file changes. The ranks of a job read once. The index's entries are checked on the way:
    raises CorruptDatasetError.
    """
    states = [os.stat(path(dataset.prefix)) for path in (bin_path, idx_path)]
    description = {
        "kind": "token range",
        "file": os.path.realpath(bin_path(dataset.prefix)),
        "states": [[state.st_size, state.st_mtime_ns, state.st_ctime_ns] for state in states],
    }
    folder = Path(cache or index_cache.default_folder(dataset.prefix))
    (found,) = index_cache.load_or_build(folder, description, lambda: {"token_range": _find(dataset)})
    return int(found[0]), int(found[1])


def _find(dataset: IndexedDataset) -> np.ndarray:
    dataset.check()
    tokens = np.asarray(dataset.tokens)
    found = np.zeros((1, 2), np.int64)
    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        tqdm(
            total=tokens.nbytes, unit="B", unit_scale=True, desc=f"ids of {dataset.prefix}", delay=SECONDS_WITHOUT_BAR
        ) as bar,
    ):
        for start in range(0, len(tokens), STRETCH):
            stretch = tokens[start : start + STRETCH]
            pieces = np.array_split(stretch, usable_cores())
            found = np.concatenate((found, *pool.map(_range_of, pieces)))
            bar.update(stretch.nbytes)
    return np.array([found[:, 0].min(), found[:, 1].max()])


def _range_of(tokens: np.ndarray) -> np.ndarray:
    """(1, 2) int64: lowest (0 or below) and highest (0 or above)."""
    low, high = 0, 0
    for start in range(0, len(tokens), PIECE):
        piece = tokens[start : start + PIECE]
        high = max(high, int(piece.max()))
        if tokens.dtype.kind == "i":
            low = min(low, int(piece.min()))
    return np.array([[low, high]], np.int64)
