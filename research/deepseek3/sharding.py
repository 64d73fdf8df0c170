"""How every operator is split over devices: the one page to review before a run.

Devices of a pipeline stage form a grid (dp, cp, mp), mp fastest, so that a model-parallel group is consecutive ranks.
Tokens lie on dp and cp; between blocks, with use_seq_parallel, on mp too. Heads and FFN width lie on mp.
The MoE sees the same devices as a grid (edp, ep), ep fastest, with edp * ep = dp * cp * mp: every device routes its
own tokens, and ep consecutive devices share one set of experts.

A plan maps the name of an operator to the layouts of its inputs (and outputs, after "->"), one axis name (or several,
or "None") per tensor axis. A name that the cell lacks, or an axis that the grid lacks, is an error.
An operator without a plan is split by the compiler as it likes: one that writes a parameter splits the parameter too.
"""

import functools
import math

import mindspore as ms
from mindspore import Layout, lazy_inline, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import get_rank

from mindformers_ext.config.pipeline import FOLDED, Place
from mindformers_ext.layers.fused_ops import SequencePart
from mindformers_ext.layers.moe_dispatch import ExpertGroup
from mindformers_ext.layers.vocabulary import VocabularyGroup

ALL = ("dp", "cp", "mp")  # every device of the stage
ROWS = ("dp", "cp")  # tokens where heads or widths take mp
NONE = "None"


def is_sharded() -> bool:
    """True when MindSpore's parallel compiler splits operators (parallel_mode semi-auto or auto)."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")


def token_axes(config) -> tuple[str, ...]:
    """Axes of the tokens between blocks."""
    return ALL if config.parallel_config.use_seq_parallel else ROWS


def heads(*last: str) -> tuple:
    """(B, N, S, D): batch on dp, heads on mp, sequence on cp."""
    return ("dp", "mp", "cp") + (last or (NONE,))


def plans(config) -> dict[str, dict[str, tuple]]:
    """Every plan by name; see the file's head for how to read one."""
    tokens, width, flat = (token_axes(config), NONE), (ROWS, "mp"), (ALL, NONE)
    batch = ("dp", NONE)
    vocab = NONE if config.parallel_config.vocab_emb_dp else "mp"
    return {
        "token_norm": rms_norm_plan(tokens),
        "latent_norm": rms_norm_plan(tokens),
        # projections: x (T, in), weight (out, in)
        "column_parallel": {"matmul": ((ROWS, NONE), ("mp", NONE))},
        "row_parallel": {"matmul": (width, (NONE, "mp"), "->", tokens)},
        "latent": {"matmul": (tokens, (NONE, NONE))},
        "lm_head": {"matmul": ((ROWS, NONE), ("mp", NONE))},
        "embedding": {"gather": ((vocab, NONE), (ROWS,))},
        # attention: (B, N, S, D)
        "latent_attention": {
            "to_heads": (("dp", "cp", "mp", NONE), "->", heads()),
            "from_heads": (heads(), "->", ("dp", "cp", "mp", NONE)),
            "share_key": (heads(),),
            "cat_query": (heads(), heads()),
            "cat_key": (heads(), heads()),
        },
        "split_tokens": {"split": (tokens, "->", tokens, tokens)},
        "split_heads": {"split": (heads(), "->", heads(), heads())},
        "core_attention": attention_plan(),
        **sparse_attention_plans(tokens),
        "largest_logits": {
            "largest": (heads(),),
            "larger": ((NONE,), (NONE,)),
            "keep": ((NONE,), (NONE,)),
        },
        "query_rotary": rotary_plan(heads()),
        "query_rotary_at": rotary_plan(heads(), "dp"),
        "key_rotary": rotary_plan(("dp", NONE, "cp", NONE)),
        "key_rotary_at": rotary_plan(("dp", NONE, "cp", NONE), "dp"),
        **lora_plans(tokens, width),
        # feed-forward
        "feed_forward_width": {"silu": (width,), "gate_mul": (width, width)},
        "feed_forward_tokens": {"silu": (tokens,), "gate_mul": (tokens, tokens)},
        "decoder_layer": {"add_attention": (tokens, tokens), "add_mlp": (tokens, tokens)},
        "multi_token_predictor": {"cat": (tokens, tokens)},
        "shift_left": {"rest": (batch,), "last": (batch,), "cat": (batch, batch)},
        "mixture_of_experts": {
            "count_mul": (flat, flat),
            "count": (flat,),
            "add_load": ((NONE,), (NONE,)),
            "count_dropped": (flat,),
            "add_dropped": ((NONE,), (NONE,)),
            **({"add_shared": (tokens, tokens)} if config.moe_config.shared_expert_num else {}),
        },
        "causal_lm": {"add_loss_parts": ((NONE,), (NONE,))},
        "mean_loss": {"weigh": ((NONE,), (NONE,)), "total": ((NONE,),)},
        "balance_loss": {
            "sum_experts": (flat,),
            "normalize": (flat, flat),
            "mask_mul": (flat, flat),
            "sum_tokens": (("dp", ("cp", "mp"), NONE),),
        },
    }


def sparse_attention_plans(tokens: tuple) -> dict[str, dict[str, tuple]]:
    """The indexer: its heads lie on mp as the model's; what all heads share, (B, 1, S, S), is split by queries."""
    rows, key = ("dp", NONE, "cp", NONE), ("dp", NONE, "cp", NONE)
    whole = ("dp", "mp", NONE, NONE)
    return {
        "layer_norm": {"norm": (tokens, (NONE,), (NONE,))},
        "indexer": {
            "to_heads": (("dp", "cp", "mp", NONE), "->", heads()),
            "share_key": (heads(),),
            "cat_query": (heads(), heads()),
            "cat_key": (key, key),
            "query_key": (heads(), whole),
            "relu": (heads(),),
            "weigh": (heads(), heads()),
            "sum_heads": (heads(),),
        },
        "selection": {"mask_scores": (rows, (NONE, NONE, "cp", NONE)), "keep_selected": (rows, rows)},
        "selected": {"add_mask": (heads(), rows)},
        "indexer_loss": {
            "sum_heads": (heads(),),
            "mean_heads": (rows, ()),
            "log_softmax": (rows,),
            "floor": (rows, ()),
            "log": (rows,),
            "difference": (rows, rows),
            "weigh": (rows, rows),
            "sum_keys": (rows,),
            "count": (("dp", NONE, "cp"), ("dp", NONE, "cp")),
            "total": (("dp", NONE, "cp"),),
        },
    }


def selection_plan() -> tuple:
    """Layouts of the per-device selection: scores (B, 1, S, S), the mask of the selected."""
    rows = ("dp", NONE, "cp", NONE)
    return (rows,), (rows,)


def lora_plans(tokens: tuple, width: tuple) -> dict[str, dict[str, tuple]]:
    """LoRA: x (T, in), lora_a (rank, in), lora_b (out, rank), split where the projection beside them is.

    `dropout` takes x; `adapted` adds the adapter to the projection's output. The rank is never split.
    """
    whole, x = (NONE, NONE), (ROWS, NONE)
    return {
        "lora_column_parallel": {"dropout": (x,), "down": (x, whole), "up": (x, ("mp", NONE))},
        "lora_row_parallel": {"dropout": (width,), "down": (width, (NONE, "mp")), "up": (x, whole)},
        "lora_latent": {"dropout": (tokens,), "down": (tokens, whole), "up": (tokens, whole)},
        "adapted_column_parallel": {"add_lora": (width, width)},
        "adapted_row_parallel": {"add_lora": (tokens, tokens)},
        "adapted_latent": {"add_lora": (tokens, tokens)},
    }


def experts_plan(outputs: int) -> tuple:
    """Layouts of the per-device MoE program on the grid (edp, ep): inputs, then outputs."""
    tokens, experts = (("edp", "ep"), NONE), ("ep", NONE, NONE)
    return (tokens, (NONE, NONE), (NONE,), experts, experts), (tokens,) * outputs


def embedding_plan(config) -> tuple:
    """Layouts of the look-ups: the table, whole or split on mp, and ids; then the rows.

    A device with the whole table looks its own tokens up; of a split one it gives what it has for the whole group's.
    """
    whole, tokens = config.parallel_config.vocab_emb_dp, token_axes(config)
    return ((NONE if whole else "mp", NONE), (tokens if whole else ROWS,)), ((tokens, NONE),)


def losses_plan() -> tuple:
    """Layouts of the cross entropy: logits and labels, then the tokens' losses."""
    return ((ROWS, "mp"), (ROWS,)), ((ROWS,),)


def packed_attention_plan() -> tuple:
    """Layouts of the per-device attention over documents: query, key, value, ends; context, largest scores."""
    whole = ("dp", "mp", NONE, NONE)
    return (heads(), whole, whole, ("dp", NONE)), (heads(), heads())


def adapter_plan() -> tuple:
    """Layouts of the program that adds a LoRA adapter to the experts it belongs to."""
    experts = ("ep", NONE, NONE)
    return (experts,) * 3, (experts,)


def rms_norm_plan(x: tuple) -> dict[str, tuple]:
    """RMSNorm's operators on x; the weight is whole on every device. The fused operator is called `norm`."""
    return {
        "norm": (x, (NONE,)),
        "square": (x,),
        "mean": (x,),
        "add_eps": (x, ()),
        "rsqrt": (x,),
        "normalize": (x, x),
        "scale": (x, (NONE,)),
    }


def attention_plan() -> dict[str, tuple]:
    """Operators of the basic and of the flash attention: each device's queries meet the keys of the whole sequence."""
    whole = ("dp", "mp", NONE, NONE)
    return {
        "scale_query": (heads(), ()),
        "query_key": (heads(), whole),
        "add_mask": (heads(), (NONE, NONE, "cp", NONE)),
        "softmax": (heads(),),
        "weigh_value": (heads(), whole),
        "causal": (heads(), whole, whole, (NONE, NONE)),
        "masked": (heads(), whole, whole, ("dp", NONE, "cp", NONE)),
    }


def rotary_plan(x: tuple, batch: str = NONE) -> dict[str, tuple]:
    """Rotary operators on x (B, N, S, D) with tables (1, 1, S, D), or (B, 1, S, D) with `batch` on dp."""
    table = (batch, NONE, x[2], NONE)
    turn = dict.fromkeys(("first_cos", "first_sin", "second_cos", "second_sin"), (x, table))
    return {
        "rotary": (x, table, table),
        "first": (x,),
        "second": (x,),
        **turn,
        "sub": (x, x),
        "add": (x, x),
        "cat": (x, x),
    }


# Operators that take layouts by name only as self-defined local programs, outputs included.
TAKES_NUMBERS = ("StridedSlice", "SplitWithSize", "Concat", "Transpose", "Tile", "RotaryPositionEmbedding")

OPERATOR_CHOICES = {"split"} | set(rms_norm_plan(())) | set(rotary_plan((NONE,) * 4)) | set(attention_plan())


def shard(cell: nn.Cell, plan: str, config) -> None:
    """Give the operators of `cell` their layouts; does nothing where the compiler does not split."""
    if not is_sharded():
        return
    p = config.parallel_config
    sizes = {"dp": p.data_parallel, "cp": p.context_parallel, "mp": p.model_parallel}
    for name, layouts in plans(config)[plan].items():
        if name in OPERATOR_CHOICES and not hasattr(cell, name):
            continue  # the fused and the basic cell of one role have different operators
        apply(getattr(cell, name), sizes, layouts)


def share_graph(init):
    """Decorate `__init__(self, config)` of a net: with a pipeline, its graph is compiled once for all micro-batches.

    Layers must not share graphs too, tempting as it is for the compile time. MindSpore 2.9 would then, with a
    pipeline, add every layer's gradient to the accumulators of all layers; and without one, clip by a global norm
    sqrt(dp) too large, because it does not find the copies of a weight through a shared graph.
    """
    shared = lazy_inline(init)

    @functools.wraps(init)
    def build(self, config):
        pipelined = config.parallel_config.pipeline_stage > 1 and ms.get_context("device_target") == "Ascend"
        (shared if pipelined else init)(self, config)

    return build


def apply(operator, sizes: dict[str, int], layouts: tuple) -> None:
    """Shard one operator; layouts after "->" are its outputs'."""
    cut = layouts.index("->") if "->" in layouts else len(layouts)
    plain = all(in_grid_order(axes, sizes) for axes in layouts if axes != "->")
    grid = Layout(tuple(sizes.values()), tuple(sizes))
    if operator.name == "Tile" and not plain:
        layouts = (("dp", NONE, "cp", NONE),)  # repeats a local key for all heads; the compiler cuts them next
    if operator.name in TAKES_NUMBERS:
        if plain:
            layouts = layouts[:cut]
        else:
            operator.add_prim_attr("self_define_shard", True)
            layouts = layouts if "->" in layouts else (*layouts, "->", layouts[0])
            cut = layouts.index("->")

    def split(axes):
        if plain:
            return tuple(ways(axis, sizes) for axis in axes)
        return grid(*axes) if axes else grid()

    inputs = tuple(split(axes) for axes in layouts[:cut])
    outputs = tuple(split(axes) for axes in layouts[cut + 1 :])
    if operator.name == "Concat" and not plain:
        inputs = (inputs,)  # names go in one tuple, as the tensors do; numbers do not
    if outputs:
        operator.shard(in_strategy=inputs, out_strategy=outputs)
    else:
        operator.shard(in_strategy=inputs)


def ways(axis, sizes: dict[str, int]) -> int:
    """Devices one tensor axis is split over."""
    names = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(sizes[name] for name in names if name != NONE)


def in_grid_order(axes: tuple, sizes: dict[str, int]) -> bool:
    """True when plain numbers say the same as the names.

    Numbers lay devices out in the order of the tensor's axes; the grid may be in another (heads before sequence).
    Few operators take names, so numbers are used wherever they mean the same.
    """
    names = [name for axis in axes for name in (axis if isinstance(axis, tuple) else (axis,))]
    split = [ALL.index(name) for name in names if name != NONE and sizes[name] > 1]
    return split == sorted(split)


def axis_names(layouts: tuple) -> set[str]:
    """The grid axes that layouts name."""
    axes = [axis for layout in layouts for axis in layout]
    return {name for axis in axes for name in (axis if isinstance(axis, tuple) else (axis,))} - {NONE}


def run_locally(function, shapes, types, plan: tuple, config):
    """`function` as every device runs it on its own part of the inputs; itself where nothing is split.

    `shapes` and `types` give those of the results from the inputs', `plan` the layouts, all on one of the two grids.
    """
    if not is_sharded():
        return function
    p = config.parallel_config
    sizes = {"dp": p.data_parallel, "cp": p.context_parallel, "mp": p.model_parallel}
    inputs, outputs = plan
    if "ep" in axis_names(outputs):
        sizes = {"edp": math.prod(sizes.values()) // p.expert_parallel, "ep": p.expert_parallel}
    grid = Layout(tuple(sizes.values()), tuple(sizes))
    morph = ops.Morph(function, shapes, types).add_prim_attr("self_define_shard", True)
    morph.shard(in_strategy=tuple(grid(*x) for x in inputs), out_strategy=tuple(grid(*x) for x in outputs))
    return morph


def sequence_part(config) -> SequencePart:
    """What this device has of every sequence."""
    p = config.parallel_config
    if not is_sharded():
        return SequencePart(config.num_heads)
    index = get_rank() // p.model_parallel % p.context_parallel
    return SequencePart(config.num_heads // p.model_parallel, index, p.context_parallel)


def packed_locally(attention: nn.Cell, config):
    """A device's attention over documents as an operator of all devices."""

    def shapes(query, key, value, ends):
        return [*query[:3], value[3]], [*query[:3], 8]

    def types(query, *_):
        return query, mstype.float32

    return cell_locally(attention, shapes, types, packed_attention_plan(), config)


def documents_locally(mask: nn.Cell, seq: int, config):
    """(B, S) float32 <- ends of documents (B, L), each device of its own samples."""

    def shapes(ends):
        return [ends[0], seq]

    def types(ends):
        return mstype.float32

    return cell_locally(mask, shapes, types, ((("dp", NONE),), (("dp", NONE),)), config)


def cell_locally(cell: nn.Cell, shapes, types, plan: tuple, config):
    """`cell` as every device runs it on its part of the grid (dp, cp, mp); itself where nothing is split."""
    return run_locally(cell.construct, shapes, types, plan, config) if is_sharded() else cell


def expert_group(config) -> ExpertGroup:
    """The expert-parallel group of this device; one device where nothing is split."""
    p = config.parallel_config
    moe = config.moe_config
    by_node = moe.use_gmm and moe.moe_token_dispatcher_type == "alltoall_deredundency"
    inner = moe.npu_nums_per_device if by_node else p.model_parallel
    return ExpertGroup(p.expert_parallel, get_rank(), inner) if is_sharded() else ExpertGroup()


def vocabulary_group(config, split: bool = True) -> VocabularyGroup:
    """The devices that share this one's vocabulary: the model-parallel group, or it alone."""
    parts = config.parallel_config.model_parallel if split and is_sharded() else 1
    return VocabularyGroup(parts, get_rank()) if parts > 1 else VocabularyGroup()


def put(cell: nn.Cell, where: Place) -> None:
    """Put a cell on its pipeline stage. MindSpore counts chunks by the stages' order, but for a folded pipeline."""
    cell.pipeline_stage = where.stage
    if ms.get_auto_parallel_context("pipeline_scheduler") == FOLDED:
        cell.pipeline_segment = where.chunk


def place(layer: nn.Cell, index: int, config) -> None:
    """Set pipeline stage, recomputation and gradient fusion of decoder layer `index` (MTP's follow the last)."""
    p = config.parallel_config
    pipeline = config.placed()
    put(layer, pipeline.places[index])
    fusion_groups = max(p.gradient_aggregation_group, 1)
    per_group = -(-(config.num_layers + config.mtp_depth) // fusion_groups)
    layer.set_comm_fusion(index // per_group + 1)
    recompute = p.recompute
    if index in pipeline.covered(recompute.recompute):
        layer.recompute(
            mp_comm_recompute=recompute.mp_comm_recompute,
            parallel_optimizer_comm_recompute=recompute.parallel_optimizer_comm_recompute,
            recompute_slice_activation=recompute.recompute_slice_activation,
        )
    elif index in pipeline.covered(recompute.select_recompute):
        for operator in activations(layer):
            operator.recompute()


def activations(layer: nn.Cell) -> list:
    """Cheap operators with large outputs, which select_recompute runs again instead of keeping."""
    ffn = layer.mlp.shared_experts if hasattr(layer.mlp, "shared_experts") else layer.mlp
    return [getattr(ffn.swiglu, name) for name in ("silu", "gate_mul") if hasattr(ffn.swiglu, name)]
