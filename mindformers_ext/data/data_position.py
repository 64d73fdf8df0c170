"""Where training stands in its data, saved so that a resumed run reads exactly the next sample.

MindFormers resumes by counting steps (``dataset.set_init_step``), which is exact while the global batch stays the
same. A position counts samples instead and knows which data and seed it belongs to, so the number of devices and the
batch size may change.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mindformers_ext.atomic_files import write_json
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

    def save(self, path: str | Path) -> None:
        """Write it as JSON, under a temporary name first."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "DataPosition":
        """Read what ``save`` wrote. Raises FileNotFoundError, or ValueError for another kind of file."""
        try:
            return cls(**json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path} is no data position ({error})") from error


def start_of(path: str | None, here: DataPosition | None) -> int:
    """First sample to read: 0 without a file, else its count; ``here`` is checked to be the same data."""
    if path is None:
        return 0
    saved = DataPosition.load(path)
    if here is not None and here.data_hash != saved.data_hash:
        raise ValueError(
            f"{path} was saved with other data, sizes, sequence length or seed; its position means nothing"
        )
    return saved.consumed_samples
