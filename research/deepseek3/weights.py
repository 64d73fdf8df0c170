"""What HuggingFace calls our weights: the one name table, read in both directions.

An entry joins our parameter to one or several HuggingFace tensors and says how they are laid out in it. Names and
layer numbers come from the configuration, never from sorting strings.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mindformers_ext.files import _transpose

__all__ = [
    "INDEXER",
    "Entry",
    "boxes",
    "from_huggingface",
    "name_table",
    "parameter_count",
    "to_huggingface",
    "write_part",
]

INDEXER = ".self_attn.indexer."  # in the names of the weights of V3.2's lightning indexers, ours and HuggingFace's

Box = tuple[tuple[int, int], ...]  # (start, stop) on each axis


@dataclass(frozen=True)
class Entry:
    """One of our parameters and its HuggingFace tensors, in order; `layout` says how they lie in ours."""

    ours: str
    shape: tuple[int, ...]  # ours
    theirs: tuple[str, ...]
    layout: str = "same"  # same | gate_up: (gate, up) of every expert | down: of every expert | stacked: all experts
    copies: tuple[str, ...] = ()  # tensors that HuggingFace stores again

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape of each HuggingFace tensor."""
        if self.layout == "same":
            return self.shape
        experts, rows, columns = self.shape
        if self.layout == "stacked":
            return experts, columns, rows
        return (columns // 2 if self.layout == "gate_up" else columns), rows


def parameter_count(config, mtp: bool = False) -> int:
    """Values in a checkpoint, router biases included; MTP's layers only on demand. Allocates nothing."""
    return sum(math.prod(e.shape) for e in name_table(config) if mtp or not e.ours.startswith("mtp."))


def name_table(config, stacked: bool = False) -> Iterator[Entry]:
    """Every parameter a checkpoint holds, MTP's layers last (HF `model.layers.{num_layers + depth}`).

    `stacked`: the HuggingFace files hold the experts of a layer in two tensors, `experts.gate_up_proj` (E, 2F, H) and
    `experts.down_proj` (E, H, F), as transformers 5 keeps them in memory, instead of three for every expert.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    aliases = [f"model.layers.{i}" for i in range(config.num_layers, config.num_layers + config.mtp_depth)]
    embeddings = tuple(f"{alias}.embed_tokens.weight" for alias in aliases)
    heads = tuple(f"{alias}.shared_head.head.weight" for alias in aliases)
    tied = config.tie_word_embeddings
    copies = embeddings + heads if tied else embeddings
    yield Entry("model.embed_tokens.weight", (vocab, hidden), ("model.embed_tokens.weight",), copies=copies)
    for i in range(config.num_layers):
        yield from layer_table(config, i, f"model.layers.{i}", f"model.layers.{i}", stacked)
    yield Entry("model.norm.weight", (hidden,), ("model.norm.weight",))
    if not tied:
        yield Entry("lm_head.weight", (vocab, hidden), ("lm_head.weight",), copies=heads)
    for depth, theirs in enumerate(aliases):
        ours = f"mtp.{depth}"
        yield Entry(f"{ours}.enorm.weight", (hidden,), (f"{theirs}.enorm.weight",))
        yield Entry(f"{ours}.hnorm.weight", (hidden,), (f"{theirs}.hnorm.weight",))
        yield Entry(f"{ours}.eh_proj.weight", (hidden, 2 * hidden), (f"{theirs}.eh_proj.weight",))
        yield Entry(f"{ours}.shared_head_norm.weight", (hidden,), (f"{theirs}.shared_head.norm.weight",))
        yield from layer_table(config, config.num_layers + depth, f"{ours}.layer", theirs, stacked)


def layer_table(config, index: int, ours: str, theirs: str, stacked: bool) -> Iterator[Entry]:
    """The parameters of decoder layer `index`, called `ours` here and `theirs` there."""
    shapes = {"input_layernorm": (config.hidden_size,), "post_attention_layernorm": (config.hidden_size,)}
    shapes |= {f"self_attn.{name}": shape for name, shape in attention_shapes(config).items()}
    moe = config.moe_config
    if not config.is_moe_layer(index):
        shapes |= ffn_shapes("mlp", config.hidden_size, config.intermediate_size)
    elif moe.shared_expert_num:
        width = moe.shared_expert_num * moe.moe_intermediate_size
        shapes |= ffn_shapes("mlp.shared_experts", config.hidden_size, width)
    for name, shape in shapes.items():
        name = name if name.endswith(".bias") else f"{name}.weight"
        yield Entry(f"{ours}.{name}", shape, (f"{theirs}.{name}",))
    if config.is_moe_layer(index):
        yield from expert_table(config, f"{ours}.mlp", f"{theirs}.mlp", stacked)


def attention_shapes(config) -> dict[str, tuple[int, ...]]:
    """Weights of one MLA, (out, in)."""
    hidden, latent, heads = config.hidden_size, config.kv_lora_rank, config.num_heads
    query = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        shapes = {"q_proj": (query, hidden)}
    else:
        rank = config.q_lora_rank
        shapes = {"q_a_proj": (rank, hidden), "q_a_layernorm": (rank,), "q_b_proj": (query, rank)}
    return shapes | {
        "kv_a_proj_with_mqa": (latent + config.qk_rope_head_dim, hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        "o_proj": (hidden, heads * config.v_head_dim),
        **(indexer_shapes(config) if config.has_indexer else {}),
    }


def indexer_shapes(config) -> dict[str, tuple[int, ...]]:
    """Weights of one lightning indexer, (out, in)."""
    heads, width = config.index_n_heads, config.index_head_dim
    return {
        "indexer.wq_b": (heads * width, config.q_lora_rank),
        "indexer.wk": (width, config.hidden_size),
        "indexer.k_norm": (width,),
        "indexer.k_norm.bias": (width,),
        "indexer.weights_proj": (heads, config.hidden_size),
    }


def ffn_shapes(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """Weights of one SwiGLU, (out, in)."""
    return {
        f"{name}.gate_proj": (width, hidden),
        f"{name}.up_proj": (width, hidden),
        f"{name}.down_proj": (hidden, width),
    }


def expert_table(config, ours: str, theirs: str, stacked: bool) -> Iterator[Entry]:
    """Router and routed experts of one layer."""
    moe, hidden = config.moe_config, config.hidden_size
    count, width = moe.expert_num, moe.moe_intermediate_size
    yield Entry(f"{ours}.gate.weight", (count, hidden), (f"{theirs}.gate.weight",))
    if moe.topk_method == "noaux_tc":
        bias = "gate.e_score_correction_bias"
        yield Entry(f"{ours}.{bias}", (count,), (f"{theirs}.{bias}",))
    gate_up_shape, down_shape = (count, hidden, 2 * width), (count, width, hidden)
    if stacked:
        for name, shape in (("gate_up_proj", gate_up_shape), ("down_proj", down_shape)):
            yield Entry(f"{ours}.experts.{name}", shape, (f"{theirs}.experts.{name}",), "stacked")
        return
    experts = [f"{theirs}.experts.{i}" for i in range(count)]
    gate_up = tuple(f"{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up"))
    yield Entry(f"{ours}.experts.gate_up_proj", gate_up_shape, gate_up, "gate_up")
    down = tuple(f"{expert}.down_proj.weight" for expert in experts)
    yield Entry(f"{ours}.experts.down_proj", down_shape, down, "down")


def boxes(entry: Entry, first: int, last: int) -> Iterator[tuple[str, Box]]:
    """Where each HuggingFace tensor lies in our parameter, for those that touch rows first..last of its first axis.

    Gate lies beside up, (E, H, 2F); experts are transposed, HuggingFace's (F, H) to our (H, F).
    """
    whole = tuple((0, size) for size in entry.shape)
    if entry.layout in ("same", "stacked"):
        yield entry.theirs[0], whole
        return
    for expert in range(first, last):
        if entry.layout == "down":
            yield entry.theirs[expert], ((expert, expert + 1), *whole[1:])
            continue
        half = entry.shape[2] // 2
        for part, name in enumerate(entry.theirs[2 * expert : 2 * expert + 2]):
            yield name, ((expert, expert + 1), whole[1], (part * half, (part + 1) * half))


def from_huggingface(entry: Entry, load: Callable[[str], Any], slices: tuple[slice, ...] = ()) -> np.ndarray:
    """Our parameter of `entry`, or the part `slices` of it (one slice of step 1 for each leading axis).

    `load` returns a HuggingFace tensor by name; only the needed part of it is indexed, so it may read lazily. Where
    the tensors of the part have several types, it is float32.
    """
    slices = slices + (slice(None),) * (len(entry.shape) - len(slices))
    wanted = tuple(part.indices(size)[:2] for part, size in zip(slices, entry.shape, strict=True))
    if entry.layout == "same":
        return load(entry.theirs[0])[tuple(slice(*bounds) for bounds in wanted)]
    result = None
    for name, box in boxes(entry, *wanted[0]):
        common = overlap(wanted, box)
        if common is None:
            continue
        place, (experts, rows, columns) = common
        values = load(name)[(experts, columns, rows) if entry.layout == "stacked" else (columns, rows)]
        if result is None:
            result = np.empty([max(stop - start, 0) for start, stop in wanted], values.dtype)
        elif values.dtype != result.dtype:  # experts of several types
            result, values = (array.astype(np.float32, copy=False) for array in (result, values))
        for one, value in zip(result[place], values.reshape(-1, *values.shape[-2:]), strict=True):
            _transpose.transpose_into(one, value)
    return np.empty([max(b - a, 0) for a, b in wanted], np.float32) if result is None else result


def overlap(wanted: Box, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What two boxes share, as slices of the first and of the second; None when nothing."""
    shared = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(wanted, box, strict=True)]
    if any(start >= stop for start, stop in shared):
        return None
    here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(shared, wanted, strict=True))
    there = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(shared, box, strict=True))
    return here, there


def to_huggingface(entry: Entry, value: np.ndarray) -> dict[str, np.ndarray]:
    """The HuggingFace tensors of our parameter `value`, stored copies included."""
    if entry.layout == "same":
        return dict.fromkeys(entry.theirs + entry.copies, value)
    return {name: write_part(entry, value, box) for name, box in boxes(entry, 0, len(value))}


def write_part(entry: Entry, ours: Any, box: Box) -> np.ndarray:
    """The HuggingFace tensor that lies at `box` of our parameter `ours`; reads only that part."""
    values = ours[tuple(slice(*bounds) for bounds in box)]
    if entry.layout == "same":
        return values
    result = np.empty((len(values), *values.shape[:0:-1]), values.dtype)
    for place, value in zip(result, values, strict=True):
        _transpose.transpose_into(place, value)
    return result if entry.layout == "stacked" else result[0]
