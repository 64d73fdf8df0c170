"""What a layer computes on one rank for one micro-batch, in closed form: products, attention, and bytes that move.

Times are a roofline with a rounded corner, (arithmetic^3 + bytes^3)^(1/3): 40 products of V3's sizes measured on an
H100 agree to 10 % (root mean square weighted by time; the longer of both to 11 %, the root of both squares to 8 %).
Bytes are those that fused operators read and write; `Software.traffic` says how many more a system's operators move.
"""

from dataclasses import dataclass, field

from mindformers_ext.config.run import DTYPE_BYTES
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.plan import Plan
from mindformers_ext.dryrun.transfers import capacity_rows

FLOAT_BYTES = 4
# The backward pass of attention computes its five products from queries and keys again.
ATTENTION_BACKWARD = 2.5
JOINED_BYTES = 2 * FLOAT_BYTES  # a product that adds to a float32 buffer reads and writes that
BACKWARD_TRAFFIC = 2.0  # reads what the forward pass read, and gradients of what it wrote


@dataclass
class Part:
    """A part of a layer in its forward pass."""

    name: str
    products: list[tuple[float, float, float, float]] = field(default_factory=list)  # rows, inner, outer; weights
    attention_macs: float = 0.0
    moved_bytes: float = 0.0
    kernels: float = 0.0  # share of a layer's operators
    low_precision: bool = True  # its products may run at the fp8 peak


@dataclass(frozen=True)
class Seconds:
    """Seconds by cause."""

    forward: dict[str, float]
    backward: dict[str, float]


def layer_parts(plan: Plan, is_moe: bool) -> list[Part]:
    """Forward pass of a decoder layer."""
    model, moe = plan.model, plan.model.moe_config
    unit = DTYPE_BYTES[model.compute_dtype]
    hidden, heads = model.hidden_size, model.num_heads / plan.mp
    tokens, rows = plan.tokens, plan.row_tokens
    qk, dv, latent, rope = model.qk_head_dim, model.v_head_dim, model.kv_lora_rank, model.qk_rope_head_dim
    up_kv = heads * (model.qk_nope_head_dim + dv)
    down = [(rows, hidden, latent + rope, 1)]
    up = [(tokens, latent, up_kv, 1)]
    if model.q_lora_rank is None:
        up.append((tokens, hidden, heads * qk, 1))
    else:
        down.append((rows, hidden, model.q_lora_rank, 1))
        up.append((tokens, model.q_lora_rank, heads * qk, 1))
    latents = (model.q_lora_rank or 0) + latent
    executed = heads * (qk + dv) * model.seq_length * (0.5 if model.use_flash_attention else 1.0)
    parts = [
        Part("norm", moved_bytes=rows * (4 * hidden + 2 * latents) * unit, kernels=0.1),
        Part("mla_down", down, kernels=0.1),
        # queries are turned and keys put together from their parts
        Part("mla_up", up, moved_bytes=tokens * (2 * heads * qk + up_kv + heads * (qk + dv)) * unit, kernels=0.2),
        Part("attention", attention_macs=tokens * executed, kernels=0.1),
        Part("output", [(tokens, heads * dv, hidden, 1)], kernels=0.05),
        Part("residual", moved_bytes=6 * rows * hidden * unit, kernels=0.05),
    ]
    if model.has_indexer:  # all products, and (S, S) scores in float32 that some ten operators read and write
        index, length = model.index_n_heads / plan.mp, model.seq_length
        products = [
            (tokens, model.q_lora_rank, index * model.index_head_dim, 1),
            (rows, hidden, model.index_head_dim, 1),
        ]
        macs, moved = tokens * index * model.index_head_dim * length, tokens * length * (4 * index + heads + 10) * 4
        parts.append(Part("indexer", products, attention_macs=macs, moved_bytes=moved, kernels=0.5))
    if not is_moe:
        return parts + _swiglu(plan, "mlp", model.intermediate_size)
    if moe.shared_expert_num:
        whole = moe.shared_expert_split == "tokens"
        parts += _swiglu(plan, "shared", moe.shared_expert_num * moe.moe_intermediate_size, whole)
    own, width = plan.own_tokens, moe.moe_intermediate_size
    chosen, buffer = expert_rows(plan), buffer_rows(plan)
    copies = own * moe.num_experts_chosen
    experts = moe.expert_num / plan.ep
    scores = own * moe.expert_num * FLOAT_BYTES
    return [
        *parts,
        Part("router", [(own, hidden, moe.expert_num, 1)], moved_bytes=8 * scores, kernels=0.15, low_precision=False),
        # to the order of the experts and back
        Part("dispatch", moved_bytes=(2 * own + 2 * copies + 4 * buffer) * hidden * unit, kernels=0.1),
        Part("swiglu", moved_bytes=buffer * 3 * width * unit, kernels=0.02),
        Part(
            "experts",
            [(chosen, hidden, 2 * width, experts), (chosen, width, hidden, experts)],
            kernels=0.08,
        ),
    ]


def _swiglu(plan: Plan, name: str, width: float, whole: bool = False) -> list[Part]:
    """Of width on mp and all tokens, or of `whole` weights and a rank's own tokens."""
    hidden, tokens = plan.model.hidden_size, plan.own_tokens if whole else plan.tokens
    width = width if whole else width / plan.mp
    moved = tokens * 3 * width * DTYPE_BYTES[plan.model.compute_dtype]
    products = [(tokens, hidden, 2 * width, 1), (tokens, width, hidden, 1)]
    return [Part(name, products, kernels=0.1), Part("swiglu", moved_bytes=moved, kernels=0.05)]


def expert_rows(plan: Plan) -> float:
    """Rows that a rank's experts multiply when routing is balanced."""
    rows = plan.own_tokens * plan.model.moe_config.num_experts_chosen
    return capacity_rows(plan) if plan.dispatcher == "capacity" else rows


def buffer_rows(plan: Plan) -> float:
    """Rows of the experts' buffers: balanced, a factor more, or as many as could choose this rank's experts."""
    moe, rows = plan.model.moe_config, expert_rows(plan)
    if plan.dispatcher != "allgather" or moe.dropless_rows == "exact" or plan.ep == 1:
        return rows
    if moe.dropless_rows == "bounded":
        return rows * moe.dropless_row_factor
    return plan.own_tokens * plan.ep * min(moe.num_experts_chosen, moe.expert_num // plan.ep)


def head_parts(plan: Plan) -> list[Part]:
    """Forward pass of an output head with its loss."""
    vocabulary, hidden = plan.model.vocab_size / plan.mp, plan.model.hidden_size
    moved = plan.tokens * vocabulary * 2 * FLOAT_BYTES
    product = [(plan.tokens, hidden, vocabulary, 1)]
    return [Part("head", product, moved_bytes=moved, kernels=0.2, low_precision=False)]


def projection_parts(plan: Plan) -> list[Part]:
    """MTP's eh_proj with its norms."""
    hidden, rows = plan.model.hidden_size, plan.row_tokens
    moved = 8 * rows * hidden * DTYPE_BYTES[plan.model.compute_dtype]
    return [Part("mtp", [(rows, 2 * hidden, hidden, 1)], moved_bytes=moved, kernels=0.1)]


def part_seconds(plan: Plan, profile: DeviceProfile, part: Part) -> Seconds:
    """Time of a part's forward and backward pass by cause; the backward computes nothing again."""
    software, unit = plan.software, DTYPE_BYTES[plan.model.compute_dtype]
    low = software.low_precision and part.low_precision
    rate = profile.product_flops(low)
    kernel = profile.kernel_us * 1e-6
    products = beside = inside = accumulated = 0.0
    for rows, inner, outer, weights in part.products:
        arithmetic, values = 2 * rows * inner * outer / rate, weights * inner * outer
        operands = rows * (inner + outer) * unit
        seconds = _both(arithmetic, (operands + values * unit) / profile.memory_bytes_per_s)
        products += seconds
        accumulated += values
        if software.joined_values and (weights > 1 or values <= software.joined_values):
            inside += _both(arithmetic, (operands + values * JOINED_BYTES) / profile.memory_bytes_per_s) - seconds
        else:
            beside += values
    peak = profile.peak_fp8_tflops if software.low_precision_attention else profile.peak_tflops
    attention = 2 * part.attention_macs / (peak * 1e12 * profile.attention_efficiency)
    moved = part.moved_bytes * software.traffic.get(part.name, 1.0)
    if low:  # operands are written once more, in fp8, by row and by column
        moved += software.quantization * sum(
            rows * inner + weights * inner * outer for rows, inner, outer, weights in part.products
        )
    others = moved / profile.memory_bytes_per_s + part.kernels * software.kernels * kernel
    casts = software.casts_weights and not plan.shard_optimizer and plan.model.param_init_type == "float32"
    cast = 6 * accumulated / profile.memory_bytes_per_s if casts else 0.0
    host = part.kernels * software.kernels * (1 - software.graphed) * software.host_us * 1e-6
    summed = inside + beside * software.accumulation_bytes / profile.memory_bytes_per_s
    return Seconds(
        {PRODUCTS: products, ATTENTION: attention, OTHERS: others + cast, HOST: host},
        {
            PRODUCTS: 2 * products,
            ATTENTION: ATTENTION_BACKWARD * attention,
            OTHERS: BACKWARD_TRAFFIC * others,
            ACCUMULATION: summed,
            HOST: 2 * host,
        },
    )


def _both(arithmetic: float, moved: float) -> float:
    """Seconds of a product whose arithmetic and bytes take so long alone."""
    return (arithmetic**3 + moved**3) ** (1 / 3)


PRODUCTS, ATTENTION, OTHERS = "products", "attention", "other operators"
ACCUMULATION, HOST = "gradient accumulation", "host"
