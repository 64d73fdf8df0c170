"""What HuggingFace calls our weights: the one name table, read in both directions.

An entry joins our parameter to one or several HuggingFace tensors and says how they are laid out in it. Names are
templates; layer and expert numbers come from the configuration, never from sorting strings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["Entry", "from_huggingface", "name_table", "to_huggingface"]


@dataclass(frozen=True)
class Entry:
    """One of our parameters and its HuggingFace tensors, in order; `stacked` names the layout of several."""

    ours: str
    theirs: tuple[str, ...]
    layout: str = "same"  # same | gate_up: experts x (gate, up) | down: experts
    copies: tuple[str, ...] = ()  # tensors that HuggingFace stores again


def name_table(config) -> Iterator[Entry]:
    """Every parameter a checkpoint holds, MTP's layers last (HF `model.layers.{num_layers + depth}`)."""
    last_mtp = config.num_layers + config.mtp_depth
    aliases = [f"model.layers.{i}" for i in range(config.num_layers, last_mtp)]
    yield same("model.embed_tokens.weight", copies=tuple(f"{a}.embed_tokens.weight" for a in aliases))
    for i in range(config.num_layers):
        yield from layer_table(config, i, f"model.layers.{i}")
    yield same("model.norm.weight")
    yield same("lm_head.weight", copies=tuple(f"{a}.shared_head.head.weight" for a in aliases))
    for depth, theirs in enumerate(aliases):
        ours = f"mtp.{depth}"
        for name in ("enorm", "hnorm", "eh_proj"):
            yield same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
        yield same(f"{ours}.shared_head_norm.weight", f"{theirs}.shared_head.norm.weight")
        yield from layer_table(config, config.num_layers + depth, f"{ours}.layer", theirs)


def same(ours: str, theirs: str | None = None, copies: tuple[str, ...] = ()) -> Entry:
    """A parameter laid out as in HuggingFace."""
    return Entry(ours, (theirs or ours,), copies=copies)


def layer_table(config, index: int, ours: str, theirs: str | None = None) -> Iterator[Entry]:
    """The parameters of decoder layer `index`, called `ours` here and `theirs` there."""
    theirs = theirs or ours
    names = ["input_layernorm", "post_attention_layernorm"]
    query = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_a_layernorm", "q_b_proj"]
    attention = [*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    names += [f"self_attn.{name}" for name in attention]
    projections = ("gate_proj", "up_proj", "down_proj")
    if not config.is_moe_layer(index):
        names += [f"mlp.{name}" for name in projections]
    elif config.moe_config.shared_expert_num:
        names += [f"mlp.shared_experts.{name}" for name in projections]
    for name in names:
        yield same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
    if config.is_moe_layer(index):
        yield from expert_table(config, f"{ours}.mlp", f"{theirs}.mlp")


def expert_table(config, ours: str, theirs: str) -> Iterator[Entry]:
    """Router and routed experts of one layer."""
    moe = config.moe_config
    yield same(f"{ours}.gate.weight", f"{theirs}.gate.weight")
    if moe.topk_method == "noaux_tc":
        yield same(f"{ours}.gate.e_score_correction_bias", f"{theirs}.gate.e_score_correction_bias")
    experts = [f"{theirs}.experts.{i}" for i in range(moe.expert_num)]
    gate_up = tuple(f"{e}.{part}_proj.weight" for e in experts for part in ("gate", "up"))
    yield Entry(f"{ours}.experts.gate_up_proj", gate_up, "gate_up")
    yield Entry(f"{ours}.experts.down_proj", tuple(f"{e}.down_proj.weight" for e in experts), "down")


def from_huggingface(entry: Entry, load: Callable[[str], np.ndarray]) -> np.ndarray:
    """Our parameter of `entry`; `load` returns a HuggingFace tensor by name.

    gate_up is (E, H, 2F): gate beside up, both transposed from HuggingFace's (F, H); down is (E, F, H).
    """
    tensors = [load(name) for name in entry.theirs]
    if entry.layout == "same":
        return tensors[0]
    if entry.layout == "down":
        return np.stack([t.T for t in tensors])
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return np.stack([np.concatenate((gate.T, up.T), axis=1) for gate, up in pairs])


def to_huggingface(entry: Entry, value: np.ndarray) -> dict[str, np.ndarray]:
    """The HuggingFace tensors of our parameter `value`, stored copies included."""
    if entry.layout == "same":
        return {name: value for name in entry.theirs + entry.copies}
    if entry.layout == "down":
        parts = [expert.T for expert in value]
    else:
        parts = [half.T for expert in value for half in np.split(expert, 2, axis=1)]
    return {name: np.ascontiguousarray(part) for name, part in zip(entry.theirs, parts, strict=True)}
