"""What HuggingFace calls our weights: the one name table, read in both directions.

An entry joins our parameter to one or several HuggingFace tensors and says how they are laid out in it. Names and
layer numbers come from the configuration, never from sorting strings.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Entry", "from_huggingface", "name_table", "parameter_count", "to_huggingface"]


@dataclass(frozen=True)
class Entry:
    """One of our parameters and its HuggingFace tensors, in order; `layout` says how several lie in ours."""

    ours: str
    shape: tuple[int, ...]  # ours
    theirs: tuple[str, ...]
    layout: str = "same"  # same | gate_up: (gate, up) of every expert | down: of every expert
    copies: tuple[str, ...] = ()  # tensors that HuggingFace stores again


def parameter_count(config, mtp: bool = False) -> int:
    """Values in a checkpoint, router biases included; MTP's layers only on demand. Allocates nothing."""
    return sum(math.prod(e.shape) for e in name_table(config) if mtp or not e.ours.startswith("mtp."))


def name_table(config) -> Iterator[Entry]:
    """Every parameter a checkpoint holds, MTP's layers last (HF `model.layers.{num_layers + depth}`)."""
    hidden, vocab = config.hidden_size, config.vocab_size
    aliases = [f"model.layers.{i}" for i in range(config.num_layers, config.num_layers + config.mtp_depth)]
    copies = tuple(f"{alias}.embed_tokens.weight" for alias in aliases)
    yield Entry("model.embed_tokens.weight", (vocab, hidden), ("model.embed_tokens.weight",), copies=copies)
    for i in range(config.num_layers):
        yield from layer_table(config, i, f"model.layers.{i}", f"model.layers.{i}")
    yield Entry("model.norm.weight", (hidden,), ("model.norm.weight",))
    copies = tuple(f"{alias}.shared_head.head.weight" for alias in aliases)
    yield Entry("lm_head.weight", (vocab, hidden), ("lm_head.weight",), copies=copies)
    for depth, theirs in enumerate(aliases):
        ours = f"mtp.{depth}"
        yield Entry(f"{ours}.enorm.weight", (hidden,), (f"{theirs}.enorm.weight",))
        yield Entry(f"{ours}.hnorm.weight", (hidden,), (f"{theirs}.hnorm.weight",))
        yield Entry(f"{ours}.eh_proj.weight", (hidden, 2 * hidden), (f"{theirs}.eh_proj.weight",))
        yield Entry(f"{ours}.shared_head_norm.weight", (hidden,), (f"{theirs}.shared_head.norm.weight",))
        yield from layer_table(config, config.num_layers + depth, f"{ours}.layer", theirs)


def layer_table(config, index: int, ours: str, theirs: str) -> Iterator[Entry]:
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
        yield Entry(f"{ours}.{name}.weight", shape, (f"{theirs}.{name}.weight",))
    if config.is_moe_layer(index):
        yield from expert_table(config, f"{ours}.mlp", f"{theirs}.mlp")


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
    }


def ffn_shapes(name: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    """Weights of one SwiGLU, (out, in)."""
    return {
        f"{name}.gate_proj": (width, hidden),
        f"{name}.up_proj": (width, hidden),
        f"{name}.down_proj": (hidden, width),
    }


def expert_table(config, ours: str, theirs: str) -> Iterator[Entry]:
    """Router and routed experts of one layer."""
    moe, hidden = config.moe_config, config.hidden_size
    count, width = moe.expert_num, moe.moe_intermediate_size
    yield Entry(f"{ours}.gate.weight", (count, hidden), (f"{theirs}.gate.weight",))
    if moe.topk_method == "noaux_tc":
        bias = "gate.e_score_correction_bias"
        yield Entry(f"{ours}.{bias}", (count,), (f"{theirs}.{bias}",))
    experts = [f"{theirs}.experts.{i}" for i in range(count)]
    gate_up = tuple(f"{expert}.{part}_proj.weight" for expert in experts for part in ("gate", "up"))
    yield Entry(f"{ours}.experts.gate_up_proj", (count, hidden, 2 * width), gate_up, "gate_up")
    down = tuple(f"{expert}.down_proj.weight" for expert in experts)
    yield Entry(f"{ours}.experts.down_proj", (count, width, hidden), down, "down")


def from_huggingface(entry: Entry, load: Callable[[str], np.ndarray]) -> np.ndarray:
    """Our parameter of `entry`; `load` returns a HuggingFace tensor by name.

    gate_up is (E, H, 2F): gate beside up, both transposed from HuggingFace's (F, H); down is (E, F, H).
    """
    tensors = [load(name) for name in entry.theirs]
    if entry.layout == "same":
        return tensors[0]
    if entry.layout == "down":
        return np.stack([tensor.T for tensor in tensors])
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return np.stack([np.concatenate((gate.T, up.T), axis=1) for gate, up in pairs])


def to_huggingface(entry: Entry, value: np.ndarray) -> dict[str, np.ndarray]:
    """The HuggingFace tensors of our parameter `value`, stored copies included."""
    if entry.layout == "same":
        return dict.fromkeys(entry.theirs + entry.copies, value)
    if entry.layout == "down":
        parts = [expert.T for expert in value]
    else:
        parts = [half.T for expert in value for half in np.split(expert, 2, axis=1)]
    return {name: np.ascontiguousarray(part) for name, part in zip(entry.theirs, parts, strict=True)}
