"""LoRA (arXiv 2106.09685): adapters beside the frozen projections, PEFT's folder format, and merging.

The model builds a `LoraAdapter` (or `ExpertAdapters`) where `model_config.pet_config` asks for one; everything else
about adapters is in this file, their layouts in sharding.py. MindFormers' own pet/ wraps models of its own and saves
a format that nobody else reads; a pet_config with `pet_type` would start it and is refused.

Shapes are PEFT's: lora_a (rank, in), lora_b (out, rank), of routed experts with the experts' axis in front.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import Uniform, initializer
from peft_folder import ADAPTER_CONFIG, ADAPTER_FILE, PEFT_PREFIX, PeftFolder
from safetensors.numpy import save_file
from sharding import adapter_plan, run_locally, shard
from weights import Entry, boxes, name_table, overlap

from mindformers_ext.config.model import FFN_TARGETS, LoraConfig
from mindformers_ext.errors import ConfigError
from mindformers_ext.files.atomic import whole_file, write_json
from mindformers_ext.files.safetensors_format import StoredTensor
from mindformers_ext.sharded_checkpoint.reader import Source

__all__ = [
    "ExpertAdapters",
    "LoraAdapter",
    "MergedWeights",
    "PeftFolder",
    "adapter_entries",
    "freeze_base",
    "frozen_names",
    "is_adapter",
    "save_peft",
]

PROJECTIONS = ("_proj", "_proj_with_mqa", "lm_head")  # how the names of nn.Linear end, which peft can adapt


def parameters_of(lora: LoraConfig, in_dim: int, out_dim: int, *experts: int) -> tuple[Parameter, Parameter]:
    """lora_a, uniform as PEFT starts it, and lora_b, zero, float32: training begins from the model as it was."""
    bound = 1 / math.sqrt(in_dim)  # Kaiming uniform with a = sqrt(5)
    a = initializer(Uniform(bound), (*experts, lora.lora_rank, in_dim), mstype.float32)
    b = initializer("zeros", (*experts, out_dim, lora.lora_rank), mstype.float32)
    return Parameter(a, name="lora_a"), Parameter(b, name="lora_b")


class LoraAdapter(nn.Cell):
    """alpha / rank * B A dropout(x), to be added to a projection of the same x."""

    def __init__(self, config, in_dim: int, out_dim: int, axes: str):
        super().__init__()
        lora = config.lora
        self.lora_a, self.lora_b = parameters_of(lora, in_dim, out_dim)
        self.scale, self.compute_dtype = lora.scale, getattr(mstype, config.compute_dtype)
        self.drops = lora.lora_dropout > 0
        self.dropout = ops.Dropout(keep_prob=1 - lora.lora_dropout)
        self.down, self.up = ops.MatMul(transpose_b=True), ops.MatMul(transpose_b=True)
        shard(self, f"lora_{axes}", config)

    def construct(self, x):
        """(T, out) <- x (T, in), which is in the compute dtype."""
        if self.drops and self.training:
            x = self.dropout(x)[0]
        latent = self.down(x, ops.cast(self.lora_a, self.compute_dtype)) * self.scale  # (T, rank)
        return self.up(latent, ops.cast(self.lora_b, self.compute_dtype))


class ExpertAdapter(nn.Cell):
    """alpha / rank * (B A)^T of every routed expert, to be added to one of its matrices, `part` of FFN_TARGETS.

    lora_a (E, rank, in) and lora_b (E, out, rank) lie with their experts; each device makes those that it holds.
    """

    def __init__(self, config, part: str):
        super().__init__()
        hidden, width = config.hidden_size, config.moe_config.moe_intermediate_size
        sizes = (width, hidden) if part == "down_proj" else (hidden, width)
        self.lora_a, self.lora_b = parameters_of(config.lora, *sizes, config.moe_config.expert_num)
        self.part, self.width = part, width
        self.scale, self.compute_dtype = config.lora.scale, getattr(mstype, config.compute_dtype)
        self.product = ops.BatchMatMul(transpose_a=True, transpose_b=True)
        self.add = run_locally(self._add, self._as_weight, self._as_weight, adapter_plan(), config)

    def construct(self, weight):
        """weight (E, in, out) with the adapter added; of `gate_up_proj` (E, H, 2F) to the half that is `part`."""
        return self.add(weight, ops.cast(self.lora_a, self.compute_dtype), ops.cast(self.lora_b, self.compute_dtype))

    def _add(self, weight, a, b):
        delta = self.product(a, b) * self.scale
        if self.part == "gate_proj":
            return ops.concat((weight[:, :, : self.width] + delta, weight[:, :, self.width :]), -1)
        if self.part == "up_proj":
            return ops.concat((weight[:, :, : self.width], weight[:, :, self.width :] + delta), -1)
        return weight + delta

    def _as_weight(self, weight, *_):
        """Shape and type of the result."""
        return weight


class ExpertAdapters(nn.Cell):
    """The adapters of the routed experts, added to their weights before these meet the tokens.

    So the dispatch stays as it is, at the price of one more copy of a layer's local experts. Dropout, which would act
    on tokens, is not possible here.
    """

    def __init__(self, config):
        super().__init__()
        parts = [part for part in FFN_TARGETS if config.lora.has(f"experts.{part}")]
        for part in parts:
            self.insert_child_to_cell(part, ExpertAdapter(config, part))
        self.of_gate_up = [self._cells[part] for part in parts if part != "down_proj"]
        self.of_down = [self._cells[part] for part in parts if part == "down_proj"]

    def construct(self, gate_up, down):
        """gate_up (E, H, 2F) and down (E, F, H) with what is adapted of them."""
        for adapter in self.of_gate_up:
            gate_up = adapter(gate_up)
        for adapter in self.of_down:
            down = adapter(down)
        return gate_up, down


def is_adapter(name: str) -> bool:
    """True for the parameters of an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def freeze_base(network: nn.Cell) -> None:
    """Leave only the adapters trainable."""
    for parameter in network.get_parameters():
        if not is_adapter(parameter.name):
            parameter.requires_grad = False


def frozen_names(config) -> set[str]:
    """Names of what `freeze_base` freezes: a model's weights, without router biases, which may go on balancing."""
    if not config.lora.lora_rank:
        return set()
    return {entry.ours for entry in name_table(config) if not entry.ours.endswith("e_score_correction_bias")}


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter of ours (`….lora_a`, `….lora_b`) and the HuggingFace modules it belongs to, by expert."""

    ours: str
    modules: tuple[str, ...]  # one, or one for each expert


def adapter_entries(config) -> Iterator[AdapterEntry]:
    """Every adapter of the model that `config` describes."""
    for entry in name_table(config):
        modules = [name.removesuffix(".weight") for name in entry.theirs]
        if entry.layout == "same":
            if config.lora.wants(modules[0]):
                yield AdapterEntry(f"{entry.ours.removesuffix('.weight')}.lora", tuple(modules))
            continue
        experts = entry.ours.rpartition(".")[0]
        for part in dict.fromkeys(module.rpartition(".")[2] for module in modules):
            chosen = tuple(module for module in modules if module.endswith(f".{part}"))
            if config.lora.wants(chosen[0]):
                yield AdapterEntry(f"{experts}.lora.{part}", chosen)


def save_peft(folder: str | Path, config, values: dict[str, np.ndarray], base: str = "") -> None:
    """Write a folder that the peft package reads: adapter_model.safetensors, adapter_config.json.

    Args:
        values: our parameters `….lora_a` and `….lora_b` by name, whole.
        base: base_model_name_or_path, the folder of the model that was adapted.
    """
    folder, tensors = Path(folder), {}
    for entry in adapter_entries(config):
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            value = values[f"{entry.ours}.{ours}"]
            parts = value if value.ndim == 3 else [value]
            for module, part in zip(entry.modules, parts, strict=True):
                tensors[f"{PEFT_PREFIX}{module}.{theirs}.weight"] = np.ascontiguousarray(part, np.float32)
    lora = config.lora
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.lora_rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": lora.pattern(),
        "bias": "none",
        "inference_mode": True,
    }
    with whole_file(folder / ADAPTER_FILE) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, settings)


class MergedWeights(Source):
    """A source of weights with an adapter added: W + alpha / rank * B A, in float32.

    Raises:
        ConfigError: the adapter has a module that the model lacks, or of another shape, or lacks one that it names.
    """

    def __init__(self, weights: Source, entries: list[Entry], folder: str | Path):
        self.weights, self.adapter, self.path = weights, PeftFolder(folder), weights.path
        self.entries = {entry.ours: entry for entry in entries}
        shapes = {name.removesuffix(".weight"): entry.their_shape for entry in entries for name in entry.theirs}
        for module, (a, b, _) in self.adapter.modules.items():
            if shapes.get(module) != (b.shape[0], a.shape[1]):
                raise ConfigError(
                    f"{folder}: adapts {module} of shape {(b.shape[0], a.shape[1])}, but the model has "
                    f"{shapes.get(module, 'no such module')}; give the adapter of this model"
                )
        main = (entry for entry in entries if not entry.ours.startswith("mtp."))  # HuggingFace's models have no MTP
        named = (name.removesuffix(".weight") for entry in main for name in entry.theirs)
        self.adapter.check_complete(module for module in named if module.endswith(PROJECTIONS))

    def names(self) -> list[str]:
        """The base's."""
        return self.weights.names()

    def read(self, name: str) -> Any:
        """A parameter, merged where the adapter has a part of it."""
        entry = self.entries[name]
        adapted = any(theirs.removesuffix(".weight") in self.adapter.modules for theirs in entry.theirs)
        return MergedParameter(self.weights.read(name), entry, self.adapter) if adapted else self.weights.read(name)


@dataclass(frozen=True)
class MergedParameter:
    """A parameter with its adapter added; indexing computes only the asked part."""

    base: Any
    entry: Entry
    adapter: PeftFolder

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's."""
        return self.entry.shape

    def __getitem__(self, slices) -> np.ndarray:
        slices = slices if isinstance(slices, tuple) else (slices,)
        slices = slices + (slice(None),) * (len(self.shape) - len(slices))
        wanted = tuple(part.indices(size)[:2] for part, size in zip(slices, self.shape, strict=True))
        result = self.base[slices].astype(np.float32)
        for name, box in boxes(self.entry, *wanted[0]):
            adapter = self.adapter.modules.get(name.removesuffix(".weight"))
            common = overlap(wanted, box) if adapter else None
            if common is None:
                continue
            (place, part), (a, b, scale) = common, adapter
            if self.entry.layout == "same":
                result[place] += scale * (b[part[0]].astype(np.float32) @ a[:, part[1]].astype(np.float32))
            else:
                delta = b[part[2]].astype(np.float32) @ a[:, part[1]].astype(np.float32)
                result[place] += scale * delta.T
        return result

    def stored(self) -> Iterator[StoredTensor]:
        """The base's; an adapter's values were checked when it was read."""
        return self.base.stored()


def adapter_values(network: nn.Cell) -> dict[str, np.ndarray]:
    """The adapters of a network as numpy float32, by name."""
    return {p.name: p.asnumpy() for p in network.get_parameters() if is_adapter(p.name)}
