"""Training samples from a .bin/.idx pair, sample for sample in the order of megatron-core 0.16.1's GPTDataset.

The documents of all epochs are shuffled and laid end to end; sample k is tokens ``k * S`` to ``k * S + S`` of that
stream (the last one is the next sample's first, so that labels are shifted tokens); the samples are shuffled again.
Shapes: B samples a batch, S sequence_length, W = S + 1 (S without the extra token).
"""

import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mindformers_ext.bin_dataset import index_cache
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, idx_path, loss_mask_prefix
from mindformers_ext.bin_dataset.remote_tokens import RemoteTokens
from mindformers_ext.files import remote

try:
    from mindformers_ext.bin_dataset import _index_builder
except ImportError as error:
    raise ImportError(
        f"the C++ index builder is not compiled ({error}); run `pip install .` or "
        "`python setup.py build_ext --inplace` in the project's root"
    ) from error

NO_TOKEN = -1  # No token has this id: "no padding id" and "no end-of-document id".
SEPARATE_FINAL_EPOCH_BELOW = 0.80  # megatron-core shuffles a last epoch apart that is used less than this.
BYTES_PER_THREAD = 1 << 20  # A thread costs about 20 µs to start, the time to copy a few hundred KB.


@dataclass(frozen=True)
class GPTDatasetConfig:
    """How samples are cut, shuffled and masked. The words are megatron-core's and MindFormers'."""

    sequence_length: int  # tokens a sample
    random_seed: int = 1234  # seed of the document and sample shuffles
    split: str = "1, 0, 0"  # shares of train, valid, test
    path_to_cache: str | None = None  # folder of the built indices; None: P.index_cache beside the data
    s3_cache_path: str | None = None  # folder of the copied .idx files of data at an address; None: the temporary one
    num_dataset_builder_threads: int = 1  # datasets of a blend built at once
    eod: int = NO_TOKEN  # id that ends a document
    pad: int = NO_TOKEN  # id that fills short samples; its labels carry no loss
    reset_position_ids: bool = False  # positions restart after each eod
    reset_attention_mask: bool = False  # no attention across an eod
    eod_mask_loss: bool = False  # no loss where the input is eod
    create_attention_mask: bool = False  # add attention_mask (1, S, S), 1 where attention is forbidden
    create_compressed_eod_mask: bool = False  # add actual_seq_len (eod_pad_length,): where documents end
    eod_pad_length: int = 128  # length of actual_seq_len
    drop_last_partial_validation_sequence: bool = True  # False: keep a padded last sample of the valid split
    add_extra_token_to_sequence: bool = True  # samples share a token, so every label is real
    mid_level_dataset_surplus: float = 0.005  # extra samples built per dataset of a blend

    def __post_init__(self) -> None:
        for name in ("sequence_length", "eod_pad_length", "num_dataset_builder_threads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for item in fields(self):
            value, kind = getattr(self, item.name), float | int if item.type is float else item.type
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                raise ValueError(f"{item.name} must be of type {getattr(kind, '__name__', kind)}, got {value!r}")
        if not 0 <= self.random_seed < 2**32:
            raise ValueError(f"random_seed must be in [0, 2**32), got {self.random_seed}")
        if not 0 <= self.mid_level_dataset_surplus < 1:
            raise ValueError(f"mid_level_dataset_surplus must be in [0, 1), got {self.mid_level_dataset_surplus}")
        if self.eod == NO_TOKEN and self.needs_eod:
            raise ValueError("eod is not set: reset_*, eod_mask_loss and create_compressed_eod_mask need its token id")

    @property
    def needs_eod(self) -> bool:
        """Whether any column depends on where documents end."""
        return (
            self.reset_position_ids
            or self.reset_attention_mask
            or self.eod_mask_loss
            or self.create_compressed_eod_mask
        )

    def cache_folder(self, prefix: str) -> str:
        """Where the indices of a dataset are kept; beside the data only where that is on this machine."""
        beside = f"{tempfile.gettempdir()}/bin_dataset-{os.getuid()}" if remote.is_remote(prefix) else None
        return self.path_to_cache or self.s3_cache_path or beside or index_cache.default_folder(prefix)

    @property
    def extra(self) -> int:
        """Tokens a sample has beyond sequence_length: 1 or 0."""
        return int(self.add_extra_token_to_sequence)

    @property
    def pad_id(self) -> int:
        """``pad``, unless it equals ``eod``: then no token counts as padding, as in megatron-core."""
        return NO_TOKEN if self.pad == self.eod else self.pad


@dataclass(frozen=True)
class IndexPlan:
    """The numbers that decide the three indices of one dataset."""

    epochs: int
    samples: int  # rows of the sample index, less one
    samples_first: int  # samples shuffled together; the others (final epoch) are shuffled among themselves
    separate_final_epoch: bool

    @classmethod
    def of(cls, tokens: int, num_samples: int | None, sequence_length: int, extra: int, drop_last: bool) -> "IndexPlan":
        """Plan ``num_samples`` (None: one epoch) from ``tokens`` per epoch."""
        wanted = 0 if num_samples is None else num_samples * sequence_length + extra
        epochs = max(1, -(-wanted // tokens))
        if drop_last:
            samples = (epochs * tokens - extra) // sequence_length
        else:
            # megatron-core rounds here in float32; the same order needs the same rounding.
            samples = int(np.ceil(np.float32(epochs * tokens - extra) / np.float32(sequence_length)))
        if epochs == 1:
            return cls(1, samples, samples, False)
        samples_first = ((epochs - 1) * tokens - extra) // sequence_length
        per_epoch = (tokens - extra) // sequence_length
        separate = num_samples - samples_first < int(SEPARATE_FINAL_EPOCH_BELOW * per_epoch)
        return cls(epochs, samples, samples_first if separate else samples, separate)


def plan_samples(
    indexed: IndexedDataset, first: int, last: int, config: GPTDatasetConfig, num_samples: int | None, split: str
) -> IndexPlan:
    """The plan of the sequences [first, last) of a dataset. Raises ValueError if they give no sample at all."""
    if indexed.dtype.kind not in "iu":
        raise ValueError(f"{idx_path(indexed.prefix)} holds {indexed.dtype}; training samples need integer tokens")
    tokens = int(indexed.sequence_lengths[first:last].sum(dtype=np.int64))
    if tokens == 0:
        raise ValueError(f"the {split} split of {indexed.prefix} (sequences {first} to {last}) has no tokens")
    drop_last = split != "valid" or config.drop_last_partial_validation_sequence
    return IndexPlan.of(tokens, num_samples, config.sequence_length, config.extra, drop_last)


class GPTDataset:
    """``len`` samples of fixed length from the sequences [first, last) of an IndexedDataset.

    Building writes the indices to the cache, or finds them there. ``document_index``, ``sample_index`` and
    ``shuffle_index`` equal megatron-core's arrays.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        config: GPTDatasetConfig,
        num_samples: int | None = None,
        split: str = "train",
        first: int = 0,
        last: int | None = None,
    ) -> None:
        self.indexed = indexed
        self.config = config
        self.split = split
        self.first, self.last = first, len(indexed) if last is None else last
        self.plan = plan_samples(indexed, self.first, self.last, config, num_samples, split)
        self.loss_mask = open_loss_mask(indexed, config.s3_cache_path)
        self.description = self._describe(num_samples)
        folder = config.cache_folder(indexed.prefix)
        arrays = index_cache.load_or_build(Path(folder), self.description, self._build_indices)
        self.document_index, self.sample_index, self.shuffle_index = arrays
        index_cache.let_go(indexed.sequence_lengths)

    def _describe(self, num_samples: int | None) -> dict[str, object]:
        """All that decides the indices; the cache finds its entry by it, so stale data is never loaded."""
        return {
            "kind": "GPTDataset",
            "lengths": index_cache.fingerprint(self.indexed.sequence_lengths[self.first : self.last]),
            "sequences": [self.first, self.last],
            "num_samples": num_samples,
            "split": self.split,
            "drop_last": self.config.drop_last_partial_validation_sequence,
            "seed": self.config.random_seed,
            "sequence_length": self.config.sequence_length,
            "extra": self.config.extra,
        }

    def _build_indices(self) -> dict[str, np.ndarray]:
        key, position = np.random.RandomState(self.config.random_seed).get_state()[1:3]
        arrays = _index_builder.build_gpt_indices(
            lengths=self.indexed.sequence_lengths,
            begin=self.first,
            end=self.last,
            epochs=self.plan.epochs,
            separate_final=self.plan.separate_final_epoch,
            sequence_length=self.config.sequence_length,
            extra=self.config.extra,
            samples=self.plan.samples,
            samples_first=self.plan.samples_first,
            key=key,
            position=position,
            threads=usable_cores(),
        )
        return dict(zip(("document_index", "sample_index", "shuffle_index"), arrays, strict=True))

    def __len__(self) -> int:
        return len(self.sample_index) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: column[0] for name, column in self.batch(np.array([index])).items()}

    def tokens(self, indices: np.ndarray) -> np.ndarray:
        """Raw tokens (B, W) of many samples, int32 (int64 for int64 files). Raises IndexError out of range."""
        return self._read(self.indexed, self._places(indices), self.config.pad_id)[0]

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of many samples: input_ids, labels, loss_mask, position_ids (B, S), and the masks asked for."""
        places = self._places(indices)
        text, padded = self._read(self.indexed, places, self.config.pad_id)
        mask = None if self.loss_mask is None else self._read(self.loss_mask, places, 0)[0]
        return sample_columns(text, self.config, mask, padded)

    def _places(self, indices: np.ndarray) -> np.ndarray:
        """(B, 4) int64: first document, offset in it, last document, end offset in it."""
        indices = np.asarray(indices)
        outside = (indices < 0) | (indices >= len(self))
        if outside.any():
            raise IndexError(f"sample {indices[outside][0]} of {self.indexed.prefix}, which has {len(self)} samples")
        rows = self.shuffle_index[indices].astype(np.int64)
        return np.concatenate((self.sample_index[rows], self.sample_index[rows + 1]), axis=1, dtype=np.int64)

    def _read(self, source: IndexedDataset, places: np.ndarray, pad: int) -> tuple[np.ndarray, bool]:
        """Tokens (B, W), short samples filled with ``pad``, and whether any token is ``pad``."""
        width = self.config.sequence_length + self.config.extra
        out = np.empty((len(places), width), np.int64 if source.dtype == np.int64 else np.int32)
        if isinstance(source.tokens, RemoteTokens):
            return out, self._read_remote(source, places, pad, out)
        padded = _index_builder.read_samples(
            tokens=source.tokens,
            pointers=source.sequence_pointers,
            lengths=source.sequence_lengths,
            documents=self.document_index,
            places=places,
            extra=self.config.extra,
            pad=pad,
            out=out,
            threads=max(1, min(usable_cores(), len(places), out.nbytes // BYTES_PER_THREAD)),
        )
        return out, padded

    def _read_remote(self, source: IndexedDataset, places: np.ndarray, pad: int, out: np.ndarray) -> bool:
        """Fill ``out`` (B, W) from tokens that are fetched together; returns whether any token is ``pad``."""
        ranges, rows = [], []
        for row, (first, offset, last, end) in enumerate(places.tolist()):
            for place in range(first, last + 1):
                sequence = int(self.document_index[place])
                length = int(source.sequence_lengths[sequence])
                start = int(source.sequence_pointers[sequence]) // source.dtype.itemsize
                stop = start + (min(end + self.config.extra, length) if place == last else length)
                ranges.append((start + offset, max(stop, start + offset)))
                rows.append(row)
                offset = 0
        parts: list[list[np.ndarray]] = [[] for _ in places]
        for row, part in zip(rows, source.tokens.read(ranges), strict=True):
            parts[row].append(part)
        for row, pieces in enumerate(parts):
            text = np.concatenate(pieces)
            out[row, : len(text)], out[row, len(text) :] = text, pad
        return bool((out == pad).any())


def sample_columns(
    text: np.ndarray, config: GPTDatasetConfig, mask: np.ndarray | None = None, padded: bool = True
) -> dict[str, np.ndarray]:
    """Model inputs from raw tokens ``text`` (B, W); ``mask`` (B, W) is 1 on tokens to be learnt.

    ``padded``: whether padding may be among the tokens. loss_mask is float32, the rest has the dtype of ``text`` or
    int32. Columns that are the same for every sample are read-only views of one row.
    """
    size = config.sequence_length
    if config.add_extra_token_to_sequence:
        tokens, labels = text[:, :-1], text[:, 1:]
        learn = None if mask is None else mask[:, 1:]
    else:
        tokens, labels = text, _shift_left(text, config.pad_id)
        learn = None if mask is None else _shift_left(mask, 0)
    is_eod = tokens == config.eod if config.needs_eod else None
    if padded or learn is not None or config.eod_mask_loss or not config.add_extra_token_to_sequence:
        loss_mask = _loss_mask(labels, is_eod, learn, config)
    else:
        loss_mask = np.broadcast_to(np.ones(size, np.float32), labels.shape)
    starts = None
    if config.reset_position_ids or config.reset_attention_mask:
        starts = _document_starts(is_eod)
    positions = np.arange(size, dtype=np.int32)
    if config.reset_position_ids:
        position_ids = positions - starts
    else:
        position_ids = np.broadcast_to(positions, tokens.shape)
    columns = {"labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
    if config.create_attention_mask:
        columns["attention_mask"] = _attention_mask(starts if config.reset_attention_mask else None, len(text), size)
    if config.create_compressed_eod_mask:
        columns["actual_seq_len"] = _actual_seq_len(is_eod, config.eod_pad_length)
    # Padding is no id of the embedding; its loss is masked above. labels may be a view of text.
    if padded:
        text[text == config.pad_id] = 0
    if padded or not config.add_extra_token_to_sequence:
        labels[labels == config.pad_id] = 0
    return {"input_ids": tokens, **columns}


def _shift_left(text: np.ndarray, fill: int) -> np.ndarray:
    shifted = np.roll(text, -1, axis=1)
    shifted[:, -1] = fill
    return shifted


def _loss_mask(
    labels: np.ndarray, is_eod: np.ndarray | None, learn: np.ndarray | None, config: GPTDatasetConfig
) -> np.ndarray:
    keep = labels != config.pad_id
    if config.eod_mask_loss:
        keep &= ~is_eod
    if learn is not None:
        keep &= learn != 0
    return keep.astype(np.float32)


def _document_starts(is_eod: np.ndarray) -> np.ndarray:
    """(B, S) int32: for each token, the position its document starts at."""
    starts = np.zeros(is_eod.shape, np.int32)
    starts[:, 1:] = np.where(is_eod[:, :-1], np.arange(1, is_eod.shape[1], dtype=np.int32), 0)
    return np.maximum.accumulate(starts, axis=1)


def _attention_mask(starts: np.ndarray | None, batch: int, size: int) -> np.ndarray:
    """(B, 1, S, S) bool, True where attention is forbidden."""
    forbidden = ~np.tri(size, dtype=bool)
    if starts is None:
        return np.broadcast_to(forbidden, (batch, 1, size, size))
    return forbidden | (starts[:, None, :, None] != starts[:, None, None, :])


def _actual_seq_len(is_eod: np.ndarray, length: int) -> np.ndarray:
    """(B, length) int32: the end of each document in the sample, then S to the end, as MindFormers' flash attention."""
    size = is_eod.shape[1]
    ends = np.full((len(is_eod), length), size, np.int32)
    inside = is_eod[:, :-1]  # An eod in the last place ends no document that another follows.
    counts = inside.sum(axis=1)
    if counts.max(initial=0) > length:
        raise ValueError(f"a sample has {counts.max()} eod tokens, but eod_pad_length is {length}; raise it")
    rows, columns = np.nonzero(inside)
    slots = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    ends[rows, slots] = columns + 1
    return ends


def open_loss_mask(indexed: IndexedDataset, cache: str | None = None) -> IndexedDataset | None:
    """The loss mask that lies beside a dataset, None if there is none. Raises ValueError if it belongs to another."""
    prefix = loss_mask_prefix(indexed.prefix)
    if not remote.exists(f"{prefix}.idx"):
        return None
    mask = IndexedDataset(prefix, cache)
    if not np.array_equal(mask.sequence_lengths, indexed.sequence_lengths):
        raise ValueError(f"{idx_path(prefix)} has other lengths than {idx_path(indexed.prefix)}; make both again")
    return mask


def usable_cores() -> int:
    """Cores this process may run on, at most 16 (memory, not cores, bounds the loops)."""
    return min(16, len(os.sched_getaffinity(0)))
