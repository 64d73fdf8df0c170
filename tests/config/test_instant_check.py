"""The instant check: ten illegal plans get their sentence, the legal one passes, counts agree with published ones."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mindformers_ext.config.flops import flops_per_token
from mindformers_ext.config.run import read_run
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.dryrun.parameters import model_weights
from mindformers_ext.errors import ConfigError

INTERLEAVE, CHUNKS = "parallel.pipeline_config.pipeline_interleave", "model.model_config.pp_interleave_num"
SCHEDULER = "parallel.pipeline_config.pipeline_scheduler"
CLUSTER = Path(__file__).parents[1] / "helpers" / "runs" / "cluster_671b.yaml"


def violations(*overrides: tuple, device_num: int = 1024) -> str:
    """All sentences about the cluster YAML with these overrides."""
    try:
        plan = read_run(CLUSTER, device_num, list(overrides))
    except ConfigError as error:  # the model's own rules, before the strategy's
        return str(error)
    return "\n".join(f"{v.key}: {v.sentence}" for v in check_plan(plan))


def test_the_cluster_yaml_is_legal():
    assert violations() == ""


ILLEGAL = [
    # overrides, what the sentence must hold: both numbers and the nearest legal values
    ([("parallel_config.data_parallel", 8)], ["8 x 1 x 4 x 16 = 512", "there are 1024", "data_parallel: 16"]),
    ([("parallel_config.expert_parallel", 48)], ["48 does not divide 64", "nearest legal: 32 or 64"]),
    ([("moe_config.expert_num", 160), ("parallel_config.expert_parallel", 64)], ["64 does not divide 160", "32"]),
    ([("model.model_config.num_heads", 126)], ["divide num_heads", "4 does not divide 126", "nearest legal: 2"]),
    ([("model.model_config.vocab_size", 129281)], ["divide vocab_size", "4 does not divide 129281", "legal: 1"]),
    (
        [("moe_config.shared_expert_split", "width"), ("moe_config.moe_intermediate_size", 2046)],
        ["divide moe_intermediate_size", "4 does not divide 2046"],
    ),
    (
        [("moe_config.moe_token_dispatcher_type", "alltoall"), ("moe_config.use_gmm", False)],
        ["moe_token_dispatcher_type is 'alltoall'", "needs use_gmm"],
    ),
    (
        [("moe_config.moe_token_dispatcher_type", "alltoall"), ("moe_config.dropless_rows", "bounded")],
        ["dropless_rows is 'bounded'", "hold the rows there are"],
    ),
    ([("model.model_config.seq_length", 4098)], ["1 x 4 = 4", "4098 is not a multiple of 4", "4096 or 4100"]),
    ([("parallel_config.micro_batch_num", 8)], ["micro_batch_num is 8", "pipeline_stage is 16", "nearest legal: 16"]),
    ([("model.model_config.offset", [1] * 16)], ["num_layers = 61", "sum to 16 instead of 13", "64 layers"]),
    ([("model.model_config.offset", [1, 1])], ["has 2", "pipeline_stage is 16", "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1"]),
    ([("recompute_config.recompute", [3] * 15 + [5])], ["recompute[15]", "is 5", "holds 4", "nearest legal: 4"]),
    ([("recompute_config.select_recompute", [1] * 8)], ["has 8", "pipeline_stage is 16"]),
    (
        [("parallel.parallel_optimizer_config.optimizer_weight_shard_size", 24)],
        ["24 does not divide 64", "nearest legal: 16 or 32"],
    ),
    ([("parallel.dataset_strategy", [[4, 1]])], ["entry 0 has 4", "data_parallel is 16"]),
    (
        [("moe_config.use_gmm", False), ("moe_config.expert_group_size", 1000)],
        ["1000 does not divide 1024", "nearest legal: 512 or 1024"],
    ),
    (  # a sequence is the default group, and lies on four devices
        [("moe_config.use_gmm", False), ("moe_config.expert_group_size", None)],
        ["the default, a sequence of 4096, does not divide 1024", "nearest legal: 1024"],
    ),
    (  # a group of two sequences: which two depends on data_parallel and micro-batches
        [
            ("moe_config.use_gmm", False),
            ("moe_config.expert_group_size", 8192),
            ("runner_config.batch_size", 8),
        ],
        ["= 8192, but 8192 does not divide 4096", "nearest legal: 4096"],
    ),
    (
        [("model.model_config.tie_word_embeddings", True)],
        ["a parameter lies on one pipeline stage", "the last of 16", "nearest legal: False, or pipeline_stage 1"],
    ),
    ([("parallel.pipeline_config.pipeline_interleave", True)], ["one chunk", "pp_interleave_num to 2 or more"]),
    ([(SCHEDULER, "gpipe")], ["other orders than 1f1b only for chunks"]),
    ([(SCHEDULER, "seqvpp")], ["seq_split_num above 1"]),
    (
        [(SCHEDULER, "zero_bubble_v"), (INTERLEAVE, True), (CHUNKS, 3), ("model.model_config.offset", 0)],
        ["once forth and once back; nearest legal: 2"],
    ),
    (
        [(SCHEDULER, "zero_bubble_v"), (INTERLEAVE, True), (CHUNKS, 2), ("parallel_config.micro_batch_num", 16)],
        ["twice as many micro-batches as stages", "nearest legal: 32"],
    ),
    ([("model.model_config.pp_interleave_num", 2)], ["only with parallel.pipeline_config.pipeline_interleave True"]),
    (
        [(INTERLEAVE, True), ("model.model_config.pp_interleave_num", 4)],
        ["pipeline_stage x pp_interleave_num is 16 x 4", "num_layers is 61", "nearest legal: 8"],
    ),
    (
        [(INTERLEAVE, True), (CHUNKS, 2), ("model.model_config.offset", [[1] * 16, [1] * 16])],
        ["= 1 + offset[i] layers", "sum to 32 instead of 29", "64 layers"],
    ),
    (
        [(INTERLEAVE, True), (CHUNKS, 2), ("model.model_config.offset", [[1] * 15 + [-1], [1] * 15 + [0]])],
        ["chunk 0 of stage 15 holds 1 + (-1) = 0", "nearest legal: offset[0][15] = 0"],
    ),
    (
        [(INTERLEAVE, True), (CHUNKS, 2), ("model.model_config.offset", [[1] * 16])],
        ["one list per chunk", "pp_interleave_num is 2"],
    ),
    (
        [(INTERLEAVE, True), (CHUNKS, 2), ("model.model_config.offset", 0)]
        + [("recompute_config.recompute", [[1] * 16, [9] + [2] * 15])],
        ["recompute[1][0] must lie between 0 and the layers of chunk 1 of stage 0, but is 9", "holds 2"],
    ),
    ([("moe_config.num_experts_chosen", 300)], ["num_experts_chosen is 300", "expert_num = 256"]),
    ([("moe_config.topk_group", 9)], ["topk_group is 9", "n_group = 8", "nearest legal: 8"]),
    ([("moe_config.n_group", 7)], ["n_group is 7", "must divide expert_num = 256", "nearest legal: 4 or 8"]),
    (
        [("parallel_config.use_seq_parallel", False)],
        ["model_parallel is 4", "expert_num 256", "use_seq_parallel is True"],
    ),
    (  # both lists are too short
        [("model.model_config.offset", [1, 1]), ("recompute_config.recompute", [4, 4])],
        ["offset needs one number per pipeline stage, but has 2 and pipeline_stage is 16"],
    ),
]


@pytest.mark.parametrize(("overrides", "parts"), ILLEGAL, ids=[rule[0][0][0].split(".")[-1] for rule in ILLEGAL])
def test_illegal_plans_get_their_sentence(overrides, parts):
    text = violations(*overrides)
    for part in parts:
        assert part in text, text


def test_too_many_stages():
    text = violations(("parallel_config.pipeline_stage", 128), ("parallel_config.data_parallel", 2))
    assert "pipeline_stage is 128 and num_layers is 61; nearest legal: 32" in text


def test_wrong_kinds_name_file_key_and_value():
    with pytest.raises(ConfigError, match="cluster_671b.yaml: parallel_config.model_parallel is 'four'"):
        read_run(CLUSTER, 1024, [("parallel_config.model_parallel", "four")])
    with pytest.raises(ConfigError, match="deepseek3_config.DeepseekV3Config"):
        read_run(CLUSTER, 1024, [("model.model_config.auto_register", "nowhere.Thing")])


WRONG_KINDS = {
    "parallel_config.use_seq_parallel": ("yes", "True or False"),
    "recompute_config.recompute": (3, "True, False, or a list"),
    "model.model_config.offset": (3, "0, or a list"),
    "model.model_config.compute_dtype": ("float8", "one of 'float32', 'float16', 'bfloat16'"),
    "parallel.parallel_optimizer_config.optimizer_weight_shard_size": ("all", "or -1 for all copies"),
    "parallel.parallel_optimizer_config.parallel_optimizer_threshold": (-1, "a whole number of at least 0"),
    "runner_config.batch_size": (0, "a whole number of at least 1"),
    "model.model_config.v_head_dim": ("x", "a whole number of at least 1"),
    "moe_config.capacity_factor": (0, "a number above 0"),
    "parallel.dataset_strategy": (16, "a name, or a list of a list of whole numbers per input"),
}


@pytest.mark.parametrize(("key", "value", "says"), [(k, *v) for k, v in WRONG_KINDS.items()], ids=WRONG_KINDS)
def test_values_that_the_arithmetic_cannot_use(key, value, says):
    with pytest.raises(ConfigError, match=f"cluster_671b.yaml: {key} is {value!r}, but must be .*{says}"):
        read_run(CLUSTER, 1024, [(key, value)])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("parallel_config.pipeline_stages", "pipeline_stage"),
        ("recompute_config.recomput", "recompute"),
        ("moe_config.use_gm", "use_gmm"),
        ("model.model_config.num_layer", "num_layers"),
    ],
)
def test_unknown_keys_name_the_nearest(key, meant):
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}: unknown key with value 4; did you mean '{meant}'"):
        read_run(CLUSTER, overrides=[(key, 4)])


def test_counts_agree_with_the_released_model():
    """Facts 12 and 16 of the DeepSeek-V3 report and its README_WEIGHTS."""
    plan = read_run(CLUSTER, 1024)
    sizes = Counter()
    for weight in model_weights(plan):
        sizes[weight.name.startswith("mtp.")] += weight.size
    assert (sizes[False], sizes[True]) == (671_026_419_200, 11_610_068_224)
    assert flops_per_token(plan.model, 4096) == pytest.approx(260.6e9, rel=2e-4)
    plan.model.mtp_depth = 0
    assert flops_per_token(plan.model, 4096) == pytest.approx(250.4e9, rel=2e-4)


def test_the_check_does_not_import_mindspore():
    code = (
        "import json, sys; from mindformers_ext.config import strategy_rules;"
        "from mindformers_ext.dryrun import cost_model;"
        "from mindformers_ext.config.run import read_run;"
        f"strategy_rules.check_plan(read_run({str(CLUSTER)!r}, 1024));"
        "print(json.dumps([m for m in sys.modules if m.split('.')[0] in ('mindspore', 'mindformers')]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
