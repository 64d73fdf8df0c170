"""Every weight of the model as a name, a shape and a place, without allocating one.

Names and layouts are those of research/deepseek3/{deepseek2_model,deepseek3_model,sharding}.py; the dry run's tests
compare them, name by name, with what MindSpore's compiler stores on a rank.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from mindformers_ext.config.model import LoraConfig
from mindformers_ext.config.run import DTYPE_BYTES, Run
from mindformers_ext.dryrun.plan import Plan
from mindformers_ext.sharded_checkpoint.shards import optimizer_ways as ways_of_copies


@dataclass(frozen=True)
class Weight:
    """One parameter of the model; `axis` is the tensor dimension that is split over `ways` ranks (1: whole)."""

    name: str
    shape: tuple[int, ...]
    stage: int  # the pipeline stage that holds it
    axis: int = 0
    ways: int = 1
    trainable: bool = True
    dtype: str = ""  # "": the model's param_init_type

    @property
    def size(self) -> int:
        """Number of values in the whole weight."""
        return prod(self.shape)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """Shape on one rank, before optimizer parallelism."""
        return tuple(d // self.ways if i == self.axis else d for i, d in enumerate(self.shape))


def model_weights(plan: Run | Plan) -> Iterator[Weight]:
    """Every weight of the model once, in the order of the layers; with LoRA the adapters, and the rest frozen."""
    for stage in range(plan.pp):
        yield from first_weights(plan) if stage == 0 else ()
        for layer in plan.layers_of(stage):
            if layer < plan.model.num_layers:
                yield from layer_weights(plan, f"model.layers.{layer}.", layer, stage)
    yield from last_weights(plan)
    for depth in range(plan.model.mtp_depth):
        yield from prediction_weights(plan, depth)
        yield from layer_weights(plan, f"mtp.{depth}.layer.", plan.model.num_layers + depth, plan.pp - 1)


def first_weights(plan: Run | Plan) -> Iterator[Weight]:
    """The embedding."""
    model = plan.model
    table = (model.vocab_size, model.hidden_size)
    yield from _adapted(plan, [Weight("model.embed_tokens.weight", table, 0, 0, 1 if plan.vocab_emb_dp else plan.mp)])


def last_weights(plan: Run | Plan) -> Iterator[Weight]:
    """The last norm and the output head."""
    model, last = plan.model, plan.pp - 1
    weights = [Weight("model.norm.weight", (model.hidden_size,), last)]
    if not model.tie_word_embeddings:
        weights.append(Weight("lm_head.weight", (model.vocab_size, model.hidden_size), last, 0, plan.mp))
    yield from _adapted(plan, weights)


def prediction_weights(plan: Run | Plan, depth: int) -> Iterator[Weight]:
    """What multi-token prediction has beside its decoder layer."""
    hidden, last, prefix = plan.model.hidden_size, plan.pp - 1, f"mtp.{depth}."
    norms = [Weight(f"{prefix}{n}.weight", (hidden,), last) for n in ("enorm", "hnorm", "shared_head_norm")]
    yield from _adapted(plan, [*norms, Weight(f"{prefix}eh_proj.weight", (hidden, 2 * hidden), last)])


def layer_weights(plan: Run | Plan, prefix: str, layer: int, stage: int) -> Iterator[Weight]:
    """A decoder layer, adapters included."""
    yield from _adapted(plan, _layer(plan, prefix, layer, stage))


def _adapted(plan: Run | Plan, weights: Iterable[Weight]) -> Iterator[Weight]:
    model, lora = plan.model, plan.model.lora
    for weight in weights:
        frozen = lora.lora_rank or (model.warms_up and ".indexer." not in weight.name)
        yield replace(weight, trainable=False) if frozen else weight
        if lora.lora_rank:
            yield from _adapters(weight, lora)


def count_parameters(plan: Run | Plan) -> tuple[int, int]:
    """(values of the main model, values of multi-token prediction); shared weights once, router biases included."""
    sizes = [(w.name.startswith("mtp."), w.size) for w in model_weights(plan)]
    return sum(n for mtp, n in sizes if not mtp), sum(n for mtp, n in sizes if mtp)


def stored_shape(weight: Weight, plan: Run | Plan) -> tuple[int, ...]:
    """Shape of `weight` on one rank after optimizer parallelism, which splits dimension 0 over the weight's copies."""
    first, *rest = weight.slice_shape
    return (first // optimizer_ways(weight, plan), *rest)


def optimizer_ways(weight: Weight, plan: Run | Plan) -> int:
    """Over how many ranks optimizer parallelism splits the slice of a weight (1: not at all)."""
    if not plan.shard_optimizer or not weight.trainable:
        return 1
    rows = 0 if isinstance(plan, Plan) and plan.software.splits_any_axis else weight.slice_shape[0]
    size, copies = weight.size * parameter_bytes(weight, plan), plan.devices_per_stage // weight.ways
    return ways_of_copies(rows, size, copies, plan.optimizer_shard_size, plan.optimizer_threshold_bytes)


def parameter_bytes(weight: Weight, plan: Run | Plan) -> int:
    """Bytes of one stored value of a weight."""
    return DTYPE_BYTES[weight.dtype or plan.model.param_init_type]


def gathered_bytes(weight: Weight, plan: Run | Plan) -> int:
    """Bytes of one value when a weight is gathered for use: matrices are cast before, the embedding's rows after."""
    return DTYPE_BYTES[plan.model.compute_dtype] if is_cast(weight) else parameter_bytes(weight, plan)


def is_cast(weight: Weight) -> bool:
    """True for weights that are used in the compute dtype."""
    return not (
        len(weight.shape) == 1 or weight.name == "model.embed_tokens.weight" or weight.name.endswith("mlp.gate.weight")
    )


def is_matrix(weight: Weight) -> bool:
    """True for what Muon trains (training/muon.py): projections and experts, not the head and not LoRA's adapters."""
    return is_cast(weight) and weight.name != "lm_head.weight" and not weight.dtype


def _layer(plan: Run | Plan, prefix: str, layer: int, stage: int) -> Iterator[Weight]:
    model = plan.model

    def weight(name: str, *shape: int, axis: int = 0, ways: int = 1, trainable: bool = True) -> Weight:
        return Weight(prefix + name, shape, stage, axis, ways, trainable)

    hidden, heads, mp = model.hidden_size, model.num_heads, plan.mp
    query, latent = heads * model.qk_head_dim, model.kv_lora_rank
    yield weight("input_layernorm.weight", hidden)
    if model.q_lora_rank is None:
        yield weight("self_attn.q_proj.weight", query, hidden, ways=mp)
    else:
        yield weight("self_attn.q_a_proj.weight", model.q_lora_rank, hidden)
        yield weight("self_attn.q_a_layernorm.weight", model.q_lora_rank)
        yield weight("self_attn.q_b_proj.weight", query, model.q_lora_rank, ways=mp)
    yield weight("self_attn.kv_a_proj_with_mqa.weight", latent + model.qk_rope_head_dim, hidden)
    yield weight("self_attn.kv_a_layernorm.weight", latent)
    yield weight("self_attn.kv_b_proj.weight", heads * (model.qk_nope_head_dim + model.v_head_dim), latent, ways=mp)
    yield weight("self_attn.o_proj.weight", hidden, heads * model.v_head_dim, axis=1, ways=mp)
    if model.has_indexer:
        index_heads, width = model.index_n_heads, model.index_head_dim
        yield weight("self_attn.indexer.wq_b.weight", index_heads * width, model.q_lora_rank, ways=mp)
        yield weight("self_attn.indexer.wk.weight", width, hidden)
        yield weight("self_attn.indexer.k_norm.weight", width)
        yield weight("self_attn.indexer.k_norm.bias", width)
        yield weight("self_attn.indexer.weights_proj.weight", index_heads, hidden, ways=mp)
    yield weight("post_attention_layernorm.weight", hidden)
    if not model.is_moe_layer(layer):
        yield from _swiglu(weight, "mlp.", hidden, model.intermediate_size, mp)
        return
    moe = model.moe_config
    experts, width = moe.expert_num, moe.moe_intermediate_size
    yield weight("mlp.gate.weight", experts, hidden)
    if moe.topk_method == "noaux_tc":
        yield weight("mlp.gate.e_score_correction_bias", experts, trainable=False)
    yield weight("mlp.experts.gate_up_proj", experts, hidden, 2 * width, ways=plan.ep)
    yield weight("mlp.experts.down_proj", experts, width, hidden, ways=plan.ep)
    if moe.shared_expert_num:
        ways = mp if moe.shared_expert_split == "width" else 1
        yield from _swiglu(weight, "mlp.shared_experts.", hidden, moe.shared_expert_num * width, ways)


def _swiglu(weight, prefix: str, hidden: int, width: int, mp: int) -> Iterator[Weight]:
    yield weight(f"{prefix}gate_proj.weight", width, hidden, ways=mp)
    yield weight(f"{prefix}up_proj.weight", width, hidden, ways=mp)
    yield weight(f"{prefix}down_proj.weight", hidden, width, axis=1, ways=mp)


def _adapters(weight: Weight, lora: LoraConfig) -> Iterator[Weight]:
    """lora_a (rank, in) and lora_b (out, rank) of each projection in a weight, split where the projection is."""
    module, _, leaf = weight.name.removesuffix(".weight").rpartition(".")
    place = module.rpartition(".")[2]
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
    for part in parts:
        if not {part, f"{place}.{part}"} & set(lora.target_modules):
            continue
        if place == "experts":
            (experts, width, out), name = weight.shape, f"{module}.lora.{part}"
            lead, out, split = (experts,), out // len(parts), (weight.ways, weight.ways)
        else:
            (out, width), name = weight.shape, f"{module}.{part}.lora"
            lead, split = (), (1, weight.ways) if weight.axis == 0 else (weight.ways, 1)
        halves = {"lora_a": (*lead, lora.lora_rank, width), "lora_b": (*lead, out, lora.lora_rank)}
        for (half, shape), ways in zip(halves.items(), split, strict=True):
            yield Weight(f"{name}.{half}", shape, weight.stage, weight.axis, ways, dtype="float32")
