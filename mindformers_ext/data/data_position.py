"""Where training stands in its data, kept in the checkpoint so that a resumed run reads exactly the next sample.

MindFormers resumes by counting steps (``dataset.set_init_step``), which is exact while the global batch stays the
same. A position counts samples instead, those that are left out too, and knows which data and seed it belongs to, so
the number of devices, the batch size and `leave_out` may change.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindformers_ext.bin_dataset.blended_dataset import Dataset


@dataclass(frozen=True)
class DataPosition:
    """``consumed_samples`` of the global order, all ranks together, of the data that ``data_hash`` names."""

    consumed_samples: int
    data_hash: str

    @classmethod
    def of(cls, dataset: Dataset, consumed_samples: int) -> "DataPosition":
        """The position after ``consumed_samples`` (steps times global batch) of a dataset."""
        text = json.dumps(dataset.description, sort_keys=True)
        return cls(consumed_samples, hashlib.sha256(text.encode()).hexdigest()[:32])


def source_of(pipeline: Any) -> Any:
    """The rows that a MindSpore pipeline begins with: of our loader (SampleSource or EmptySource), or of other data."""
    while getattr(pipeline, "children", None):
        pipeline = pipeline.children[0]
    return getattr(pipeline, "source", None)


def position_of(pipeline: Any, consumed_samples: int) -> DataPosition | None:
    """The position of a MindSpore pipeline that begins at our loader; None for other data, and on ranks without."""
    dataset = getattr(source_of(pipeline), "dataset", None)
    return DataPosition.of(dataset, consumed_samples) if hasattr(dataset, "description") else None


def place_after(pipeline: Any, read: int) -> int:
    """The place in the order of the data after so many samples of a pass were read."""
    left_out = getattr(source_of(pipeline), "left_out", None)
    return read if left_out is None else left_out.place_after(read)


def read_before(pipeline: Any, place: int) -> int:
    """How many samples of a pass this pipeline reads before a place in the order of the data."""
    left_out = getattr(source_of(pipeline), "left_out", None)
    return place if left_out is None else left_out.read_before(place)


def samples_read(pipeline: Any, start: "Start", step: int, per_step: int) -> list[int]:
    """Places in the order of the data of the samples of this run's `step`-th step."""
    batch = (start.dataset_steps + step - 1) % pipeline.get_dataset_size()
    first = start.first_sample + batch * per_step
    left_out = getattr(source_of(pipeline), "left_out", None)
    places = np.arange(first, first + per_step)
    return (places if left_out is None else left_out.places(places[places < left_out.kept])).tolist()


@dataclass(frozen=True)
class Start:
    """Where this process began: all zero for a training from its first step.

    `step` counts the steps of the whole training. `dataset_steps` counts this run's batches in all passes over its
    data, and `first_sample` the samples left out before the first batch of a pass, because the batch size changed.
    """

    step: int = 0
    dataset_steps: int = 0
    first_sample: int = 0


def start_of(cb_params: Mapping[str, Any]) -> Start:
    """Where the run began, as RestoreCheckpoint left it for the other callbacks."""
    return cb_params.get("start", Start())
