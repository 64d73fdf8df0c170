"""The cost model against numbers computed by hand, and the laws it must obey."""

from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from mindformers_ext.config.run import read_run
from mindformers_ext.dryrun.cost_model import Costs, estimate, layer_activation_bytes, step_timeline
from mindformers_ext.dryrun.device_profile import DEFAULT_PROFILE, load_profile
from mindformers_ext.dryrun.parameters import model_weights, optimizer_ways, stored_shape
from mindformers_ext.dryrun.plan import Plan
from mindformers_ext.dryrun.transfers import Transfer, layer_forward, stage_boundary, wire_factor
from mindformers_ext.errors import ConfigError

CLUSTER = Path(__file__).parents[1] / "helpers" / "runs" / "cluster_671b.yaml"
RUNS = Path(__file__).parents[2] / "research" / "deepseek3"
PRETRAIN = RUNS / "deepseek3_671b" / "pretrain_deepseek3_671b.yaml"
LITE = RUNS / "deepseek2_lite" / "pretrain_deepseek2_lite.yaml"
GIB = 2**30


# What was the only way when these ranks were compiled.
STATIC = [("moe_config.dropless_rows", "worst_case"), ("moe_config.shared_expert_split", "width")]


def cluster(*overrides: tuple):
    return read_run(CLUSTER, None, STATIC + list(overrides))


def test_layer_collectives_by_hand():
    """dp16 cp1 mp4 ep8, one sequence of 4096 tokens: 1024 tokens a device, bfloat16."""
    found = Counter()
    for t in layer_forward(Plan.of(cluster()), 10):
        found[t.purpose, t.kind, t.bytes] += t.calls
    hidden = 4096 * 7168 * 2
    gathered = 8 * 1024
    assert found == {
        ("tensor parallel", "AllGather", 4096 * (1536 + 512 + 64) * 2): 1,
        ("tensor parallel", "ReduceScatter", hidden): 2,  # of attention's output and of the shared expert's
        ("tensor parallel", "AllGather", hidden): 1,
        ("expert parallel", "AllGather", gathered * 7168 * 2): 1,
        ("expert parallel", "AllGather", gathered * 8 * 4): 2,  # gates and ids
        ("expert parallel", "ReduceScatter", gathered * 7168 * 2): 1,
    }


def test_capacity_dispatch_sends_padded_rows_twice():
    """1024 tokens a device in one group: ceil(8 * 1024 * 1.5 / 256) = 48 rows for each of 256 experts."""
    plan = cluster(("moe_config.use_gmm", False), ("moe_config.capacity_factor", 1.5))
    (transfer,) = [t for t in layer_forward(Plan.of(plan), 10) if t.purpose == "expert parallel"]
    assert (transfer.kind, transfer.calls, transfer.bytes) == ("AlltoAll", 2, 256 * 48 * 7168 * 2)


def test_stage_boundary_and_wire_bytes():
    assert stage_boundary(cluster()).bytes == 4096 // 4 * 7168 * 2
    assert wire_factor("AllReduce", 4) == 1.5
    assert wire_factor("AllGather", 8) == 7 / 8
    assert wire_factor("Send", 2) == 1
    profile = load_profile()
    transfer = Transfer("expert parallel", "AlltoAll", 8, 8, 1e9, 2)
    rate = 7 * 28e9 * 0.7  # full mesh: a device sends to 7 others over as many links
    assert transfer.seconds(profile) == pytest.approx(2 * 1e9 * 7 / 8 / rate + 2 * 25e-6)
    four = Transfer("tensor parallel", "AllGather", 4, 4, 1e9, 1)
    assert four.seconds(profile) == pytest.approx(1e9 / 4 / (28e9 * 0.7) + 25e-6), "three links are left for others"
    assert not transfer.across_nodes(profile)
    assert stage_boundary(cluster()).across_nodes(profile)


def test_dense_stage_moves_what_the_compiler_moves():
    """Megabytes of all calls by kind and group size, as read from the graph that MindSpore 2.9.0 compiled for rank 0
    of a slice of the 671B YAML on 1024 devices (two dense layers, MTP on stage 1, 2 micro-batches). Look-ups were
    AllReduces in float32 then, and MTP's embeddings whole: their ReduceScatters, AllGathers and messages are those of
    rank 0 of the 1B YAML (docs/graph.md) in the sizes of this one."""
    plan = cluster(
        ("model.model_config.num_layers", 4),
        ("model.model_config.offset", 0),
        ("parallel_config.pipeline_stage", 2),
        ("parallel_config.data_parallel", 128),
        ("parallel_config.micro_batch_num", 2),
        ("parallel.parallel_optimizer_config.optimizer_weight_shard_size", -1),
    )
    found = Counter()
    for t in estimate(plan, load_profile()).stages[0].transfers:
        found[t.kind, t.group_size] += t.bytes * t.calls / 1e6
    assert {key: round(megabytes, 1) for key, megabytes in found.items()} == {
        ("AllGather", 4): 1312.8,  # the compiler's other 0.1 are token positions
        ("ReduceScatter", 4): 1243.6,
        ("Send", 2): 58.7,
        ("Receive", 2): 58.7,
        ("AllReduce", 128): 926.7,
        ("ReduceScatter", 128): 1136.7,
        ("AllGather", 128): 568.3,  # the compiler's other 16.8 are token ids and positions
        ("ReduceScatter", 512): 88.1,
        ("AllGather", 512): 44.0,
        ("AllReduce", 512): 33.2,
    }


def test_last_stage_moves_what_the_compiler_moves():
    """The same for rank 960 of the project's 671B YAML (two MoE layers, MTP, both heads; 32 micro-batches)."""
    found = Counter()
    for t in estimate(read_run(PRETRAIN, None, STATIC), load_profile()).stages[15].transfers:
        found[t.kind, t.group_size] += t.wire_bytes / 1e6
    compiled = {
        ("AllGather", 8): 19774.0 + 7398.8,  # expert parallel in a node, and weights of experts across nodes
        ("ReduceScatter", 8): 19752.0 + 14797.5,
        ("AllGather", 4): 16752.2,
        ("ReduceScatter", 4): 16747.9,
        ("Send", 2): 939.5,  # embeddings are split over mp now as the hidden states are, as in docs/graph.md
        ("Receive", 2): 939.5,
        ("ReduceScatter", 64): 605.1,
        ("AllGather", 64): 313.4,
    }
    assert {key: found[key] for key in compiled} == pytest.approx(compiled, rel=2e-3)


def test_every_depth_gets_its_embedding_from_the_first_stage():
    """As in the ranks that MindSpore 2.9.0 compiled for two depths: three messages a micro-batch each way between the
    first and the last stage, one of them the first stage's hidden states, which here go to its neighbour."""
    plan = cluster(("model.model_config.mtp_depth", 2))
    for stage in (0, plan.pp - 1):
        calls = Counter()
        for t in estimate(plan, load_profile()).stages[stage].transfers:
            if t.purpose == "pipeline parallel":
                calls[t.kind, t.bytes] += t.calls / plan.micro_batches
        boundary = stage_boundary(plan).bytes  # embeddings are split over mp as hidden states are
        assert calls == {(kind, boundary): 3 for kind in ("Send", "Receive")}


CAPACITY = [("moe_config.use_gmm", False)]


def test_capacity_dispatch_recomputes_both_of_its_exchanges():
    """MB that rank 64 of the 671B YAML with capacity dispatch sends, as compiled."""
    transfers = estimate(read_run(PRETRAIN, None, CAPACITY), load_profile()).stages[1].transfers
    assert sum(t.sent_bytes for t in transfers if t.kind == "AlltoAll") / 1e6 == pytest.approx(118380, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "overrides", "planned"),
    [
        (PRETRAIN, STATIC, {0: 21259, 1: 47069, 15: 45978}),
        (PRETRAIN, CAPACITY, {0: 20153, 1: 45968, 15: 39711}),
        (LITE, [], {0: 47821}),
    ],
    ids=["dropless", "capacity", "lite"],
)
def test_memory_agrees_with_the_compilers_plan(config, overrides, planned):
    """MiB of `Used peak memory usage (without fragments)` in the rank's log, for the first rank of each stage, of

    scripts/dryrun.py --config CONFIG --level memory --ranks 0,64,960 [--moe_config.use_gmm False] (V2-Lite: --ranks 0)
    """
    stages = estimate(read_run(config, None, overrides), load_profile()).stages
    assert {s: stages[s].memory_bytes / 2**20 for s in planned} == pytest.approx(planned, rel=0.07)


@pytest.mark.parametrize(
    ("overrides", "planned"),
    [
        (STATIC, {0: 21.5, **dict.fromkeys(range(1, 14), 46.55), 14: 40.6, 15: 45.5}),  # 1 to 13: 46.4 to 46.7
        (CAPACITY, {0: 20.4, 1: 45.2, 8: 46.4, 15: 39.0}),
    ],
    ids=["dropless", "capacity"],
)
def test_memory_agrees_with_the_plan_of_every_stage(overrides, planned):
    """GiB with fragments of the same command with `--ranks per-stage`: the README's table."""
    stages = estimate(read_run(PRETRAIN, None, overrides), load_profile()).stages
    assert {s: stages[s].memory_bytes / GIB for s in planned} == pytest.approx(planned, rel=0.06)


def test_memory_beside_the_held_values_by_hand():
    """What MindSpore's tracker lists at the peak of rank 0 (MS_ALLOC_CONF=memory_tracker:True, capacity dispatch).

    For each of 16 micro-batches the embedding's rows, whole on every rank of mp 4, and the inputs of three layers, a
    quarter each; a MoE layer's values, and the gradient of gate_up_proj, 32 experts, bfloat16.
    """
    plan = read_run(PRETRAIN, None, CAPACITY)
    stage = estimate(plan, load_profile()).stages[0]
    rows = 4096 * 7168 * 2
    assert stage.activation_bytes == 16 * (rows + 3 * rows // 4)
    assert stage.working_bytes == layer_activation_bytes(plan, 3) + 32 * 7168 * 4096 * 2


def test_layers_that_are_not_recomputed_are_gone_when_earlier_ones_are():
    """Stage 14 computes two of its three layers again, after the third's values are gone."""
    plan = read_run(PRETRAIN)
    stage = estimate(plan, load_profile()).stages[14]
    layer, boundary = layer_activation_bytes(plan, 57), 4096 // 4 * 7168 * 2
    assert stage.activation_bytes == 2 * (layer + 2 * boundary)
    assert stage.working_bytes == 32 * 7168 * 4096 * 2


def test_weights_are_split_as_the_layout_says():
    plan = cluster()
    weights = {w.name: w for w in model_weights(plan)}
    experts = weights["model.layers.10.mlp.experts.gate_up_proj"]
    assert experts.slice_shape == (32, 7168, 4096)
    assert optimizer_ways(experts, plan) == 8 and stored_shape(experts, plan) == (4, 7168, 4096)
    output = weights["model.layers.10.self_attn.o_proj.weight"]
    assert output.slice_shape == (7168, 128 * 128 // 4)
    norm = weights["model.layers.10.input_layernorm.weight"]
    assert optimizer_ways(norm, plan) == 1, "28 KiB is below the threshold of 64 KiB"
    assert weights["lm_head.weight"].stage == 15


def test_stages_sum_to_the_model():
    plan = cluster()
    cost = estimate(plan, load_profile())
    assert cost.parameters == sum(s.parameters for s in cost.stages) == 671_026_419_200 + 11_610_068_224
    per_token = sum(s.flops_per_step for s in cost.stages) * plan.devices_per_stage / plan.tokens_per_step
    assert per_token == pytest.approx(260.6e9, rel=2e-4)
    assert cost.tokens_per_s * cost.step_seconds == pytest.approx(512 * 4096)
    assert sum(cost.seconds_by_cause.values()) == pytest.approx(cost.step_seconds)


def test_memory_grows_without_recomputation_by_the_activations_in_flight():
    with_it = estimate(cluster(), load_profile()).stages[3]
    without = estimate(cluster(("recompute_config.recompute", False)), load_profile()).stages[3]
    plan = cluster()
    boundary = 4096 // 4 * 7168 * 2
    in_flight, layers = 16 - 3, 4
    grown = without.activation_bytes - with_it.activation_bytes
    assert grown == in_flight * layers * (layer_activation_bytes(plan, 12) - boundary)
    assert without.micro_batch_seconds < with_it.micro_batch_seconds


def test_bubble_of_equal_stages_is_the_textbook_one():
    """(p - 1) / (m + p - 1) for a dense model without a head to speak of."""
    plan = cluster(
        ("moe_config.expert_num", 1),
        ("moe_config.num_experts_chosen", 1),
        ("moe_config.n_group", 1),
        ("moe_config.topk_group", 1),
        ("parallel_config.expert_parallel", 1),
        ("model.model_config.num_layers", 64),
        ("model.model_config.mtp_depth", 0),
        ("model.model_config.offset", 0),
        ("model.model_config.vocab_size", 4),
        ("parallel_config.model_parallel", 1),  # no embedding to sum on the first stage
    )
    instant = replace(load_profile(), across_nodes_gb_per_s=1e9, latency_us=0)
    bubble = estimate(plan, instant).bubble
    assert bubble == pytest.approx(15 / (32 + 15), rel=0.01)


def test_profile_is_checked(tmp_path):
    text = DEFAULT_PROFILE.read_text()
    (tmp_path / "p.yaml").write_text(text.replace("peak_tflops", "peak_flops"))
    with pytest.raises(ConfigError, match="peak_flops is unknown"):
        load_profile(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_text(text.replace("64.0", "-1"))
    with pytest.raises(ConfigError, match="memory_gib is -1"):
        load_profile(tmp_path / "p.yaml")


def test_sharded_gradient_buffers_are_scattered_every_micro_batch():
    """The compiled 671B rank sends 256 ReduceScatters a step with it: as many a micro-batch as without it a step."""
    shard = ("parallel.parallel_optimizer_config.gradient_accumulation_shard", True)

    def scatters(plan) -> float:
        found = estimate(plan, load_profile()).stages[8].transfers
        return sum(t.calls for t in found if t.purpose == "data parallel" and t.kind == "ReduceScatter")

    once = scatters(read_run(PRETRAIN))
    assert scatters(read_run(PRETRAIN, None, [shard])) == 32 * once
    seconds = [estimate(read_run(PRETRAIN, None, o), load_profile()).step_seconds for o in ([], [shard])]
    assert seconds[1] > 2 * seconds[0]


def test_a_step_ends_with_the_last_stage_to_exchange_its_gradients():
    """An exchange is free while other stages compute: what counts is which stage ends last, not which is slow."""
    plan, slow = read_run(PRETRAIN), replace(load_profile(), across_nodes_gb_per_s=1.0)
    costs = Costs(Plan.of(plan), slow)
    ends = [end + costs.exchange_seconds(s)[1] for s, end in enumerate(step_timeline(costs).ends)]
    gathered = max(costs.exchange_seconds(s)[0] - sum(costs.pass_seconds[0][0][:s]) for s in range(plan.pp))
    cost = estimate(plan, slow)
    update = cost.stages[ends.index(max(ends))].optimizer_seconds
    assert cost.step_seconds == pytest.approx(max(ends) + update + gathered)


def test_muon_keeps_one_state_of_a_matrix():
    """By hand: AdamW's two float32 moments but for projections and experts, whose momentum is one."""
    run = read_run(RUNS / "deepseek3_tiny" / "pretrain_deepseek3_tiny.yaml")
    adamw, muon = (estimate(replace(Plan.of(run), muon=muon), load_profile()) for muon in (False, True))
    sizes = [(weight.name, weight.shape) for weight in model_weights(run) if weight.trainable]
    others = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
    matrices = sum(prod(shape) for name, shape in sizes if len(shape) > 1 and not name.endswith(others))
    everything = sum(prod(shape) for _, shape in sizes)
    assert adamw.stages[0].optimizer_bytes == 8 * everything
    assert muon.stages[0].optimizer_bytes == 8 * everything - 4 * matrices
    assert muon.stages[0].optimizer_seconds > adamw.stages[0].optimizer_seconds
