"""What a YAML's ``data_loader`` section asks for, read in one place: by the loader, and by the check before a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mindformers_ext.bin_dataset.blended_dataset import SPLITS, Dataset, SplitPlan, plan_splits
from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig

PHASES = {"train": 0, "valid": 1, "eval": 1, "dev": 1, "test": 2}

# MindFormers' words for fields of GPTDatasetConfig.
RENAMED = {"seq_length": "sequence_length", "seed": "random_seed", "compressed_eod_mask_length": "eod_pad_length"}
CONVERSATIONS = "conversations"  # instead of paths: what bin_dataset/conversation_job.py makes samples of
PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
# A key of upstream's YAML that means nothing here: files on this machine are always mapped.
WITHOUT_EFFECT = ("mmap_bin_files",)


def parse_config(config: Mapping[str, Any]) -> tuple[GPTDatasetConfig, dict[str, Any]]:
    """Split the YAML's ``data_loader.config`` into the samples' config and the data paths.

    Raises ValueError for an unknown key, or for one fact given twice under two names with two values.
    """
    known = {field.name for field in fields(GPTDatasetConfig)}
    given: dict[str, Any] = {}
    for key, value in config.items():
        name = RENAMED.get(key, key)
        if key in PATHS or key in WITHOUT_EFFECT or key == CONVERSATIONS or value is None:
            continue
        if name not in known:
            words = sorted(known | set(RENAMED) | {*PATHS, CONVERSATIONS})
            raise ValueError(f"config.{key} is unknown; known keys are {', '.join(words)}")
        if name in given and given[name] != value:
            raise ValueError(f"config gives {name} twice: {given[name]} and {key}: {value}")
        given[name] = value
    if "sequence_length" not in given:
        raise ValueError("config.seq_length is missing: the tokens of a sample")
    return GPTDatasetConfig(**given), {path: config.get(path) or None for path in PATHS}


@dataclass(frozen=True)
class LoaderConfig:
    """The samples of one split. Reading it raises ValueError with a sentence that names key and value."""

    samples: GPTDatasetConfig
    paths: dict[str, Any]  # by PATHS
    sizes: tuple[int | None, ...]  # samples asked of train, valid and test; None: all there are
    split: int  # which of SPLITS is read
    conversations: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls, datasets_type: str, sizes: Sequence[int | None], config: Mapping[str, Any], shuffle: bool, phase: str
    ) -> "LoaderConfig":
        """Check and join the keys of a ``data_loader`` section."""
        if datasets_type != "GPTDataset":
            raise ValueError(f"datasets_type {datasets_type!r} is unknown; the one type is GPTDataset")
        if shuffle:
            raise ValueError("shuffle must be False: samples come shuffled by config.random_seed")
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is unknown; choose one of {', '.join(PHASES)}")
        if not isinstance(sizes, list | tuple) or len(sizes) != len(SPLITS) or not all(map(_is_size, sizes)):
            raise ValueError(f"sizes must be a list of the samples of train, valid and test, got {sizes!r}")
        samples, paths = parse_config(config)
        split = PHASES[phase]
        if paths["data_path"] and any(paths[path] for path in PATHS[1:]):
            raise ValueError("config gives data_path and a split's own list; keep one of them")
        conversations = config.get(CONVERSATIONS)
        if conversations and any(paths.values()):
            raise ValueError("config gives conversations and the paths of .bin/.idx pairs; keep one of them")
        if not conversations and not paths["data_path"] and not paths[f"{SPLITS[split]}_data_path"]:
            raise ValueError(f"config needs data_path or {SPLITS[split]}_data_path, or conversations")
        return cls(samples, paths, tuple(sizes), split, conversations)

    def data_paths(self) -> dict[str, Any]:
        """The data by PATHS; conversations are tokenised the first time, and found in the cache then."""
        if not self.conversations:
            return self.paths
        from mindformers_ext.bin_dataset.conversation_job import tokenized  # Jinja and the tokenizers

        prefix = tokenized(self.conversations, self.samples.sequence_length, self.samples.path_to_cache)
        return {**self.paths, "data_path": [prefix]}

    @property
    def wanted(self) -> int | None:
        """Samples asked of the split that is read."""
        return self.sizes[self.split]

    def build(self) -> Dataset:
        """The dataset of the split, its indices built or found in the cache."""
        return self._plan().build()

    def count(self) -> int:
        """How many samples `build` has to offer, from the lengths alone. Raises what `build` raises."""
        return self.size_of(self._plan().count())

    def size_of(self, available: int) -> int:
        """Samples to read of those there are. Raises ValueError if there are none, or fewer than asked for."""
        if self.wanted is not None and available < self.wanted:
            raise ValueError(
                f"sizes[{self.split}] asks for {self.wanted} samples, but the data has {available}; give data_path "
                "weights to read it several times, or lower the number"
            )
        size = available if self.wanted is None else self.wanted
        if size == 0:
            raise ValueError(
                f"the {SPLITS[self.split]} data has no sample of {self.samples.sequence_length} tokens; lower "
                f"seq_length, give more data or raise sizes[{self.split}]"
            )
        return size

    def _plan(self) -> SplitPlan:
        sizes = [size if i == self.split else None for i, size in enumerate(self.sizes)]
        paths = self.data_paths()
        own = [paths[f"{name}_data_path"] if i == self.split else None for i, name in enumerate(SPLITS)]
        plan = plan_splits(self.samples, sizes, paths["data_path"], own, self.split)[self.split]
        if plan is None:
            raise ValueError(f"config.split {self.samples.split!r} leaves nothing for {SPLITS[self.split]}")
        return plan


def _is_size(value: object) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
