"""Read a HuggingFace folder as our parameters: by name, any part of each, FP8 and INT4 dequantised, audited first."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from hf_config import compare, config_from_hf, read_config
from ml_dtypes import bfloat16
from weights import INDEXER, Entry, from_huggingface, name_table

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.finite import all_finite
from mindformers_ext.files.safetensors_format import Output, StoredTensor, read_folder, read_index
from mindformers_ext.sharded_checkpoint.reader import Readable, Source

__all__ = ["Audit", "Dequantised", "HuggingFaceWeights", "audit_names"]

HF_INDEX = "model.safetensors.index.json"
BLOCK = 128  # rows and columns that share one FP8 scale (DeepSeek-V3 README_WEIGHTS.md)
SCALE = "_scale_inv"  # of X.weight: X.weight_scale_inv
FP8 = np.dtype("float8_e4m3fn")
# compressed-tensors' pack-quantized: X.weight is X.weight_packed, X.weight_scale and X.weight_shape.
PACKED, PACKED_SCALE, PACKED_SHAPE = "_packed", "_scale", "_shape"
GROUP = 32  # columns that share one INT4 scale
IN_A_WORD = 8  # four-bit numbers in an int32, the lowest bits first
FLOATS = ("float32", "float16", "bfloat16")
# Tables that old versions of transformers stored and all recompute, whatever is in the file.
STALE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
# What a model that reads more than text has beside its language model, and how it calls that.
NOT_TEXT = ("vision_tower.", "mm_projector.", "multi_modal_projector.", "model.vision_tower.", "model.mm_projector.")
OF_TEXT = ("language_model.", "model.language_model.")
BIAS = "e_score_correction_bias"
PIECE_BYTES = 2**20  # of rows that lie the same way in both, read and written at a time; fits into a cache
DTYPES = {"bf16": np.dtype(bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}


@dataclass(frozen=True)
class Audit:
    """Counts of a source that fits: each of its tensors is used once, each parameter is filled once."""

    tensors: int
    scales: int  # FP8 and INT4
    copies: int  # of the tensors: stored again by HuggingFace (embedding and head of the MTP layer)
    parameters: int
    left_out: int  # tensors of MTP layers that the model does not have
    stale: int = 0  # rotary tables, which nobody reads
    not_text: int = 0  # of images
    packed: int = 0  # of the tensors: INT4

    def __str__(self) -> str:
        left_out = f", {self.left_out:,} of MTP layers left out" if self.left_out else ""
        kind = "INT4 scales and shapes" if self.packed else "FP8 scales"
        left_out += f", {self.not_text:,} of images left out" if self.not_text else ""
        left_out += f", {self.stale:,} stale rotary_emb.inv_freq left out" if self.stale else ""
        return (
            f"{self.tensors:,} tensors ({self.copies} of them stored copies) and {self.scales:,} {kind} used once "
            f"each{left_out}; {self.parameters:,} parameters filled once each"
        )


def audit_names(entries: list[Entry], names: Iterable[str], where: str | Path, skip: tuple[str, ...] = ()) -> Audit:
    """Compare the tensors of a source with the name table; `skip` are prefixes of layers to leave out.

    Raises:
        ConfigError: names the first tensor that is unknown, missing, wanted twice, or a scale without its weight.
    """
    stale = {name for name in names if STALE.fullmatch(name)}
    not_text = {name for name in names if name.startswith(NOT_TEXT)}
    packed = {name for name in names if name.endswith(f".weight{PACKED}")}
    names = (set(names) - stale - not_text - packed) | {name.removesuffix(PACKED) for name in packed}
    left_out = {name for name in names if name.startswith(skip)}
    scales = {name for name in names - left_out if weight_of(name) != name}
    tensors = names - left_out - scales
    wanted = [name for entry in entries for name in entry.theirs]
    copies = {name for entry in entries for name in entry.copies}
    if len(set(wanted) | copies) != len(wanted) + len(copies):
        raise AssertionError("the name table uses a tensor twice")
    for problem, found in (
        ("has no place in this model", tensors - set(wanted) - copies),
        ("is missing", set(wanted) - tensors),
        ("is a scale without its weight", {name for name in scales if weight_of(name) not in tensors}),
    ):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ConfigError(f"{where}: tensor {min(found)!r}{more} {problem}; check config.json and the files")
    return Audit(
        len(tensors),
        len(scales),
        len(tensors & copies),
        len(entries),
        len(left_out),
        len(stale),
        len(not_text),
        len(packed),
    )


class ScaledMatrix:
    """What numbers of few bits and their scales have in common: a float32 matrix, made of the asked part only."""

    shape: tuple[int, ...]  # (rows, columns)

    @property
    def dtype(self) -> np.dtype:
        """float32."""
        return np.dtype(np.float32)

    def window(self, slices: tuple[slice, ...]) -> Iterator[tuple[int, int]]:
        """First row and one after the last, first column and one after the last."""
        slices = slices + (slice(None),) * (2 - len(slices))
        return (part.indices(size)[:2] for part, size in zip(slices, self.shape, strict=True))


@dataclass(frozen=True)
class Dequantised(ScaledMatrix):
    """An FP8 matrix and its scales, as float32: W = block * scale, edge blocks cropped (facts 12)."""

    weight: StoredTensor
    scale: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, columns)."""
        return self.weight.shape

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        (top, bottom), (left, right) = self.window(slices)
        result = self.weight[top:bottom, left:right].astype(np.float32)
        columns = np.arange(left, right) // BLOCK
        scale = self.scale[:].astype(np.float32)
        for block in range(top // BLOCK, -(-bottom // BLOCK)):
            rows = slice(max(block * BLOCK - top, 0), (block + 1) * BLOCK - top)
            result[rows] *= scale[block, columns]
        return result

    def stored(self) -> Iterator[StoredTensor]:
        """The matrix and its scales."""
        yield from (self.weight, self.scale)


@dataclass(frozen=True)
class Unpacked(ScaledMatrix):
    """An INT4 matrix as float32: eight numbers of -8..7 in an int32, a scale for GROUP columns (compressed-tensors)."""

    words: StoredTensor  # (rows, ceil(columns / 8)) int32
    scale: StoredTensor  # (rows, ceil(columns / 32))
    shape: tuple[int, ...]  # (rows, columns)

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        (top, bottom), (left, right) = self.window(slices)
        first = left // IN_A_WORD
        words = self.words[top:bottom, first : -(-right // IN_A_WORD)]
        numbers = (words[:, :, None] >> (4 * np.arange(IN_A_WORD, dtype=np.int32))) & 15  # of two's complement: 0..15
        numbers = numbers.reshape(len(words), -1)[:, left - first * IN_A_WORD : right - first * IN_A_WORD]
        scale = self.scale[top:bottom].astype(np.float32)
        return (numbers - 8).astype(np.float32) * scale[:, np.arange(left, right) // GROUP]

    def stored(self) -> Iterator[StoredTensor]:
        """The numbers and their scales."""
        yield from (self.words, self.scale)


@dataclass(frozen=True)
class LazyParameter:
    """One of our parameters in a HuggingFace folder; indexing reads only what the slices need."""

    entry: Entry
    load: Callable[[str], StoredTensor | ScaledMatrix]

    @property
    def shape(self) -> tuple[int, ...]:
        """Ours."""
        return self.entry.shape

    @cached_property
    def dtype(self) -> np.dtype:
        """The stored type; float32 for what is stored as FP8 or INT4, or in several types."""
        types = {self.load(name).dtype for name in self.entry.theirs}
        return types.pop() if len(types) == 1 else np.dtype(np.float32)

    def __getitem__(self, slices) -> np.ndarray:
        slices = slices if isinstance(slices, tuple) else (slices,)
        values = from_huggingface(self.entry, self.load, () if slices == (...,) else slices)
        return values.astype(self.dtype, copy=False)

    def stored(self) -> Iterator[StoredTensor]:
        """The HuggingFace tensors that lie in it, scales included."""
        for name in self.entry.theirs:
            yield from self.load(name).stored()


class HuggingFaceWeights(Source):
    """The parameters of a model in a HuggingFace folder, by our names. Opening reads names and shapes and audits them.

    `read` gives a parameter as an object with `shape` that reads only what it is indexed with.

    Args:
        folder: config.json and *.safetensors, with an index where there are several files.
        config: the model to fill, None to take it from config.json. An MTP layer in the files that this model does
            not have is left out.

    Raises:
        ConfigError: the folder is damaged or is another model's; names the file, tensor or key.
    """

    def __init__(self, folder: str | Path, config=None):
        self.path = Path(folder)
        values = read_config(self.path)
        self.tensors = as_text(read_folder(self.path, HF_INDEX), self.path)
        self.config = config or config_from_files(self.path, values, self.tensors)
        compare(self.config, values, self.path / "config.json")
        entries = list(name_table(self.config, is_stacked(self.tensors)))
        if self.config.warms_up and not any(INDEXER in name for name in self.tensors):
            entries = [entry for entry in entries if INDEXER not in entry.ours]  # of a V3, which the warm-up makes
        self.entries = {entry.ours: entry for entry in entries}
        depths = range(self.config.mtp_depth, mtp_depth_of(self.tensors, self.config.num_layers))
        skip = tuple(mtp_prefix(self.config.num_layers, depth) for depth in depths)
        self.audit = audit_names(entries, self.tensors, self.path, skip)
        self._check_tensors()

    def read(self, name: str) -> LazyParameter:
        """One of our parameters by name."""
        return LazyParameter(self.entries[name], self.load)

    def names(self) -> list[str]:
        """Our names of all parameters."""
        return list(self.entries)

    def load(self, name: str) -> StoredTensor | ScaledMatrix:
        """A HuggingFace tensor by its own name."""
        words = self.tensors.get(name + PACKED)
        if words is not None:
            shape = tuple(int(size) for size in self.tensors[name + PACKED_SHAPE][:])
            return Unpacked(words, self.tensors[name + PACKED_SCALE], shape)
        scale = self.tensors.get(name + SCALE)
        return Dequantised(self.tensors[name], scale) if scale else self.tensors[name]

    def _check_tensors(self) -> None:
        """Shapes, types, scales, finite biases, equal copies."""
        for entry in self.entries.values():
            for name in entry.theirs + entry.copies:
                if name + PACKED in self.tensors:
                    self._check_packed(name, entry.their_shape)
                elif name in self.tensors:
                    self._check_tensor(name, entry.their_shape)
            if entry.ours.endswith(BIAS) and not np.isfinite(self.tensors[entry.theirs[0]][:]).all():
                raise ConfigError(f"{self.path}: {entry.theirs[0]} has values that are not finite; get the file again")
            for copy in entry.copies:
                if copy in self.tensors and not self._equal(entry.theirs[0], copy):
                    raise ConfigError(
                        f"{self.path}: {copy} differs from {entry.theirs[0]}, of which it should be a copy; this "
                        "model shares the two: remove the copy, or the MTP layer and num_nextn_predict_layers"
                    )

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        tensor, scale = self.tensors[name], self.tensors.get(name + SCALE)
        if tensor.shape != shape:
            raise ConfigError(
                f"{self.path}: {name} has shape {tensor.shape}, but this model needs {shape}; check config.json"
            )
        if tensor.dtype == FP8:
            if scale is None:
                raise ConfigError(f"{self.path}: {name} is FP8, but its scale {name + SCALE} is missing")
            blocks = tuple(-(-size // BLOCK) for size in shape)
            if scale.shape != blocks or scale.dtype.name not in FLOATS:
                raise ConfigError(
                    f"{self.path}: {name + SCALE} is {scale.dtype.name} {scale.shape}, but blocks of {BLOCK} x {BLOCK} "
                    f"of {shape} need float32 {blocks}"
                )
        elif tensor.dtype.name not in FLOATS:
            raise ConfigError(f"{self.path}: {name} is {tensor.dtype.name}, but must be one of {', '.join(FLOATS)}")
        elif scale is not None:
            raise ConfigError(f"{self.path}: {name} is {tensor.dtype.name}, but has a scale {name + SCALE}")

    def _check_packed(self, name: str, shape: tuple[int, ...]) -> None:
        rows, columns = shape if len(shape) == 2 else (0, 0)
        right = {
            PACKED: (("int32",), (rows, -(-columns // IN_A_WORD))),
            PACKED_SCALE: (FLOATS, (rows, -(-columns // GROUP))),
            PACKED_SHAPE: (("int32", "int64"), (2,)),
        }
        for suffix, (types, size) in right.items():
            tensor = self.tensors.get(name + suffix)
            if tensor is None:
                raise ConfigError(f"{self.path}: {name + PACKED} is INT4, but {name + suffix} is missing")
            if tensor.dtype.name not in types or tensor.shape != size:
                raise ConfigError(
                    f"{self.path}: {name + suffix} is {tensor.dtype.name} {tensor.shape}, but groups of {GROUP} of "
                    f"{shape} need {types[0]} {size}"
                )
        told = tuple(self.tensors[name + PACKED_SHAPE][:].tolist())
        if told != shape:
            raise ConfigError(
                f"{self.path}: {name + PACKED_SHAPE} is {told}, but this model needs {shape}; check config.json"
            )

    def _equal(self, one: str, other: str) -> bool:
        first, second = self.tensors[one], self.tensors[other]
        rows = rows_of_piece(first.shape, first.dtype)
        return first.dtype == second.dtype and all(
            np.array_equal(first[row : row + rows].view(np.uint8), second[row : row + rows].view(np.uint8))
            for row in range(0, first.shape[0], rows)
        )


def as_text(tensors: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """Names without what a model that reads more than text puts before its language model's."""
    named = {}
    for name, value in tensors.items():
        prefix = next((prefix for prefix in OF_TEXT if name.startswith(prefix)), "")
        short = ("model." if prefix.startswith("model.") else "") + name.removeprefix(prefix)
        if short in named:
            raise ConfigError(f"{where}: {name!r} and {short!r} are two tensors of one name; remove one")
        named[short] = value
    return named


def weight_of(name: str) -> str:
    """The weight that a tensor scales or describes; the name itself for a weight."""
    for suffix in (SCALE, f".weight{PACKED_SCALE}", f".weight{PACKED_SHAPE}"):
        if name.endswith(suffix):
            return name.removesuffix(suffix.removeprefix(".weight"))
    return name


def is_stacked(names: Iterable[str]) -> bool:
    """True when the experts of a layer are two tensors."""
    return any(name.endswith("mlp.experts.gate_up_proj") for name in names)


def mtp_prefix(num_layers: int, depth: int) -> str:
    """How the names of the MTP layer of a depth, from 0, begin (facts 11)."""
    return f"model.layers.{num_layers + depth}."


def mtp_depth_of(names: Iterable[str], num_layers: int) -> int:
    """How many MTP layers follow the main model's layers in the files."""
    depths = 0
    names = [name for name in names if name.startswith("model.layers.")]
    while any(name.startswith(mtp_prefix(num_layers, depths)) for name in names):
        depths += 1
    return depths


def config_from_files(folder: Path, values: dict, names: Iterable[str]):
    """The configuration of a HuggingFace folder; how many MTP layers it has is read from its tensors."""
    depth = mtp_depth_of(names, values.get("num_hidden_layers", 0))
    return config_from_hf(values, depth, folder / "config.json")


def audit_index(folder: Path) -> Audit:
    """Audit the names of a folder of which only config.json and the index are there."""
    values, names = read_config(folder), as_text(read_index(folder / HF_INDEX), folder / HF_INDEX)
    config = config_from_files(folder, values, names)
    return audit_names(list(name_table(config, is_stacked(names))), names, folder / HF_INDEX)


def rows_of_piece(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows of a matrix or vector that make a piece of PIECE_BYTES."""
    return max(PIECE_BYTES // max(math.prod(shape[1:]) * dtype.itemsize, 1), 1)


def pieces_of(shape: tuple[int, ...], dtype: np.dtype) -> Iterator[tuple[slice, ...]]:
    """Slices that cut a parameter into pieces, in C order: rows of a matrix, experts of a stack.

    An expert is transposed, so each row of it would touch every page of its tensors.
    """
    rows = rows_of_piece(shape, dtype) if len(shape) < 3 else 1
    yield from ((slice(row, row + rows),) for row in range(0, shape[0], rows))


def outputs(weights: HuggingFaceWeights, dtype: np.dtype) -> Iterator[Output]:
    """Every parameter in `dtype`, router biases in float32, to be written piece by piece."""
    for name in weights.names():
        kind = np.dtype(np.float32) if name.endswith(BIAS) else dtype
        parameter = weights.read(name)
        pieces = [partial(piece, parameter, slices, kind, name) for slices in pieces_of(parameter.shape, kind)]
        yield Output(name, parameter.shape, kind, pieces)


def piece(parameter: LazyParameter, slices: tuple[slice, ...], dtype: np.dtype, name: str) -> np.ndarray:
    """Part of a parameter in `dtype`."""
    return cast(parameter[slices], dtype, name, parameter)


def cast(values: np.ndarray, dtype: np.dtype, name: str, parameter: Readable) -> np.ndarray:
    """Values of a parameter in another type, rounded to nearest even.

    Raises:
        ConfigError: a value is NaN or infinite, or beyond the type; names the tensor and its file.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        result = values if values.dtype == dtype else values.astype(dtype)
    if all_finite(result):
        return result
    if all_finite(values) and dtype == np.float16:
        raise ConfigError(f"{name}: has values that float16 cannot hold (65504 at most); choose bf16 or fp32")
    if all_finite(values):
        raise ConfigError(f"{name}: has values that {dtype.name} cannot hold; choose fp32")
    parts = list(parameter.stored())
    wrong = next((part for part in parts if not all_finite(part[...])), parts[0])
    raise ConfigError(f"{wrong.file}: {wrong.name} has values that are not finite; get the file again")
