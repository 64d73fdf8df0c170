"""A two-layer DeepSeek-V3 (one dense, one MoE layer) for the parallel runs, trained as the project trains: MindFormers'
AdamW and train-one-step cells with gradient clipping. One builder for the ranks, one for the single process."""

import mindspore as ms
import numpy as np
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v3_config
from mindformers.core.lr import ConstantWarmUpLR
from mindformers.core.optim import AdamW
from mindformers.wrapper import MFTrainOneStepCell
from mindspore import Tensor, ops
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell

from mindformers_ext.cpu_parallel.verify import Layout

LAYOUTS = [
    Layout("dp2", {"parallel": {"data_parallel": 2}}, world_size=2),
    Layout("mp2", {"parallel": {"model_parallel": 2}}, world_size=2),
    Layout("mp2-seq", {"parallel": {"model_parallel": 2, "use_seq_parallel": True}}, world_size=2),
    Layout("cp2", {"parallel": {"context_parallel": 2}}, world_size=2),
    Layout("ep2", {"parallel": {"data_parallel": 2, "expert_parallel": 2}}, world_size=2),
    Layout(
        "ep2-capacity",  # enough rows for every choice: equal to dropless
        {
            "parallel": {"data_parallel": 2, "expert_parallel": 2},
            "moe": {"use_gmm": False, "capacity_factor": 4.0},
        },
        world_size=2,
    ),
    Layout("dp2-optimizer", {"parallel": {"data_parallel": 2}, "shard_size": -1}, world_size=2),
    Layout(
        "dp2-mp2-ep2",
        {"parallel": {"data_parallel": 2, "model_parallel": 2, "expert_parallel": 2}},
        world_size=4,
    ),
]

# The same graphs with Ascend's fused operators, which the lowering maps to the CPU kernels.
OPERATORS = ("flash_attention", "fused_rope", "fused_swiglu", "fused_rms_norm")
FUSED = {"model": {f"use_{name}": True for name in OPERATORS}, "moe": {"use_fused_ops_permute": True}}
LAYOUTS += [
    Layout(f"{layout.name}-fused", layout.arguments | FUSED, layout.world_size)
    for layout in LAYOUTS
    if layout.name in ("mp2", "cp2", "ep2", "dp2-mp2-ep2")
]

BATCH = 4
SIZES = dict(
    seq_length=16, hidden_size=32, num_heads=4, intermediate_size=64, kv_lora_rank=16, q_lora_rank=16, vocab_size=64
)
MOE = dict(expert_num=8, num_experts_chosen=2, moe_intermediate_size=16)


class SingleStep(MFTrainOneStepCell):
    """The step of the single process: CPU has no overflow register to read, and this training has no overflow."""

    def get_overflow_status(self, status, compute_output):
        return ops.logical_not(ops.isfinite(compute_output[0]).all())


def data(step: int) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and labels (B, S) int32 of one step; a few labels are ignored."""
    rng = np.random.default_rng((3, step))
    ids = rng.integers(2, SIZES["vocab_size"], (BATCH, SIZES["seq_length"])).astype(np.int32)
    labels = ((ids * 5 + 1) % SIZES["vocab_size"]).astype(np.int32)
    labels[:, :2] = -100
    return ids, labels


def training_cell(
    parallel: dict,
    model: dict,
    moe: dict,
    one_step=MFTrainOneStepCell,
    inputs=lambda net: net,
    config_of=v3_config,
    network=DeepseekV3ForCausalLM,
):
    """The training cell under the parallel context that is set; `inputs` wraps the net, to name its inputs."""
    config = config_of({**MOE, **moe}, **{**SIZES, **model}, batch_size=BATCH, parallel_config=dict(parallel))
    ms.set_seed(1)
    net = network(config)
    weights = net.trainable_params()
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.1},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    schedule = ConstantWarmUpLR(learning_rate=1e-2, warmup_steps=2, total_steps=100)
    optimizer = AdamW(groups, learning_rate=schedule, betas=(0.9, 0.95), eps=1e-8)
    step = one_step(_VirtualDatasetCell(inputs(net)), optimizer, scale_sense=1.0, use_clip_grad=True)
    step.set_train()
    return step


def build(parallel: dict, model: dict | None = None, moe: dict | None = None, shard_size: int = 0, **wrapped):
    """Builder for the rank compiler; `shard_size` ranks share a weight (optimizer parallelism; -1: all, 0: off)."""
    ms.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        full_batch=True,
        enable_alltoall=True,
        search_mode="sharding_propagation",
        gradients_mean=False,
        enable_parallel_optimizer=shard_size != 0,
        parallel_optimizer_config={"parallel_optimizer_threshold": 0, "optimizer_weight_shard_size": shard_size or -1},
    )
    return training_cell(parallel, model or {}, moe or {}, **wrapped), tuple(Tensor(x) for x in data(0))


def build_single(model: dict | None = None, moe: dict | None = None, steps: int = 5, **wrapped):
    """Builder for the single process."""
    return training_cell({}, model or {}, moe or {}, SingleStep, **wrapped), [data(step) for step in range(steps)]
