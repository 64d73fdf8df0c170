"""The variables of Gaudi's DeepSeek example: what each becomes, and what is refused."""

import os
import re
import shlex

import pytest
from helpers.command_line import ROOT, run_command

from mindformers_ext.cpu_parallel.command import read_plan
from mindformers_ext.errors import ConfigError
from scripts import pretrain_deepseek

# The two commands of Gaudi's README (release 1.24).
EIGHT = (
    "HL_USE_LAZY_MODE=1 HL_TOKENIZER_TYPE=HuggingFaceTokenizer HL_DATA_DIR_ROOT=/data/pre HL_DATA_FILE_PREFIX=rp_wiki "
    "HL_TOKENIZER_MODEL=/data/tok HL_NUM_NODES=1 HL_DEVICES_PER_NODE=8 HL_DP=8 HL_TP=1 HL_PP=1 HL_EP=8 HL_GBS=8 "
    "HL_NUM_LAYERS=4 HL_TOKEN_DROP=1 HL_TOKEN_DISPATCHER_TYPE=alltoall HL_MOE_SKIP_FIRST_LAYERS=3 HL_SEQ_LEN=4096"
)
FOUR_NODES = (
    "HL_DATA_DIR_ROOT=/data/pre HL_DATA_FILE_PREFIX=rp_wiki HL_CKP_ACT=1 HL_NUM_NODES=4 HL_DEVICES_PER_NODE=8 HL_DP=16 "
    "HL_TP=1 HL_PP=2 HL_EP=16 HL_GBS=1024 HL_NUM_LAYERS=16 HL_TOKEN_DROP=1 HL_TOKEN_DISPATCHER_TYPE=alltoall "
    "HL_MOE_SKIP_FIRST_LAYERS=3 HL_SEQ_LEN=4096"
)
TINY = "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny_4p.yaml"


def variables(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


def launched(capsys, text: str, *argv: str):
    """The launcher's arguments, and the plan of the run that it starts."""
    pretrain_deepseek.run(["--dry_run", *argv], variables(text))
    said = capsys.readouterr().out
    _, script, command, *arguments = shlex.split(said.strip().splitlines()[-1])
    assert script == str(ROOT / "scripts/msrun_launcher.sh")
    return arguments, read_plan(shlex.split(command)[1:]), said


def test_one_machine(capsys):
    arguments, plan, said = launched(capsys, EIGHT)
    assert arguments[:2] == ["8", "8"]
    assert (plan.dp, plan.mp, plan.pp, plan.ep, plan.global_batch, plan.model.num_layers) == (8, 1, 1, 8, 8, 4)
    assert plan.value("train_dataset.data_loader.config.data_path") == ["1", "/data/pre/rp_wiki"]
    assert plan.value("train_dataset.data_loader.sizes") == [500000 * 8, 0, 0]
    assert plan.model.moe_config.capacity_factor == 1.0 and not plan.model.moe_config.use_gmm
    assert not plan.recompute and plan.model.moe_config.first_k_dense_replace == 3
    assert "HL_DP=8  ->  parallel_config.data_parallel: 8" in said
    assert "HL_USE_LAZY_MODE=1  ->  no key  (it chooses among Gaudi's own)" in said
    assert "HL_SAVE_INTERVAL=2000  ->  callbacks: CheckpointMonitor.save_checkpoint_steps: 2000" in said


# The variables that people type, each alone over the tiny YAML: what the plan says then.
TINY_EIGHT = "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny_8p.yaml"
LOADER = "train_dataset.data_loader"


@pytest.mark.parametrize(
    "text,key,value",
    [
        ("HL_NUM_NODES=2 HL_DEVICES_PER_NODE=4", "", None),  # the launcher's arguments; two tests below
        ("HL_DP=4 HL_NUM_NODES=1 HL_DEVICES_PER_NODE=16", "parallel_config.data_parallel", 4),
        ("HL_TP=1 HL_NUM_NODES=1 HL_DEVICES_PER_NODE=4", "parallel_config.model_parallel", 1),
        ("HL_PP=1 HL_NUM_NODES=1 HL_DEVICES_PER_NODE=4", "parallel_config.pipeline_stage", 1),
        ("HL_EP=1", "parallel_config.expert_parallel", 1),
        ("HL_GBS=32", "parallel_config.micro_batch_num", 16),
        ("HL_MBS=2", "runner_config.batch_size", 2),
        ("HL_NUM_LAYERS=6", "model.model_config.num_layers", 6),
        ("HL_SEQ_LEN=64", f"{LOADER}.config.seq_length", 64),
        ("HL_TOKEN_DROP=1", "moe_config.use_gmm", False),
        ("HL_MOE_GROUPED_GEMM=1", "moe_config.use_gmm", True),
        ("HL_TOKEN_DISPATCHER_TYPE=alltoall", "parallel.enable_alltoall", True),
        ("HL_MOE_SKIP_FIRST_LAYERS=2", "moe_config.first_k_dense_replace", 2),
        ("HL_CKP_ACT=1", "recompute_config.recompute", True),
        ("HL_RECOMPUTE_NUM_LAYERS=1", "", None),
        ("HL_DATA_DIR_ROOT=/d HL_DATA_FILE_PREFIX=p", f"{LOADER}.config.data_path", ["1", "/d/p"]),
        ("HL_TOKENIZER_MODEL=/t", "", None),
        ("HL_RESULTS_DIR=/o", "output_dir", "/o"),
        ("HL_CHECKPOINTS_DIR=/c", "callbacks.CheckpointMonitor.directory", "/c"),
        ("HL_TENSORBOARD_DIR=/t", "callbacks.TrainingMetrics.tensorboard_dir", "/t"),
        ("HL_KILL_SWITCH=/k", "use_graceful_exit", True),
        ("HL_TRAIN_ITERS=3", f"{LOADER}.sizes", [12, 0, 0]),
        ("HL_SAVE_INTERVAL=7", "callbacks.CheckpointMonitor.save_checkpoint_steps", 7),
        ("HL_EXIT_INTERVAL=5", "callbacks.TrainCallBack.stop_step", 5),
    ],
)
def test_every_variable_is_printed_and_does_what_it_says(capsys, text, key, value):
    _, plan, said = launched(capsys, text, "--config", TINY_EIGHT)
    printed = said.split("The plan is legal")[0]
    assert all(re.search(rf"\b{name.replace('HL_MBS', 'HL_MICRO_BATCH')}", printed) for name in variables(text)), said
    first, *rest = key.split(".")
    if first == "callbacks":
        assert [item[rest[1]] for item in plan.values["callbacks"] if item["type"] == rest[0]] == [value]
    elif key:
        assert plan.value(key) == value
        assert f"{key}: " in printed


def test_four_machines(capsys):
    arguments, plan, _ = launched(capsys, FOUR_NODES)
    assert arguments == [] and plan.device_num == 32
    assert (plan.pp, plan.micro_batches, plan.global_batch, plan.recompute) == (2, 64, 1024, True)
    text = f"{FOUR_NODES} HL_TORCHRUN_NODE_RANK=2 HL_TORCHRUN_MASTER_ADDR=10.0.0.1"
    assert launched(capsys, text)[0] == ["32", "8", "10.0.0.1", "", "2"]


def test_gaudis_own_defaults(capsys):
    _, plan, _ = launched(capsys, "")
    assert (plan.dp, plan.mp, plan.pp, plan.ep, plan.global_batch) == (2, 2, 2, 2, 3072)
    assert plan.model.moe_config.use_gmm and not plan.recompute and plan.sequence_parallel


def test_a_yaml_of_ones_own_stays_but_for_what_is_set(capsys):
    text = "HL_NUM_NODES=1 HL_DEVICES_PER_NODE=4 HL_GBS=16 HL_SAVE=0 HL_EXIT_INTERVAL=3 HL_TRAIN_ITERS=7"
    text += " HL_AUX_LOSS_COEFF=1e-3 HL_LR_DECAY_ITER=60 HL_LOG_INTERVAL=5 HL_RESULTS_DIR=/tmp/out"
    _, plan, _ = launched(capsys, text, "--config", TINY, "--seed", "3")
    types = [item["type"] for item in plan.values["callbacks"]]
    assert types == ["TrainingMetrics", "TopkBiasBalanceCallback", "TrainCallBack"]
    assert plan.values["callbacks"][0]["per_print_times"] == 5 and plan.values["callbacks"][2]["stop_step"] == 3
    assert plan.global_batch == 16 and plan.value("train_dataset.data_loader.sizes") == [7 * 16, 0, 0]
    assert plan.model.moe_config.aux_loss_factors == [1e-3] and plan.sections.seed == 3
    assert plan.value("lr_schedule.decay_steps") == 40 and plan.value("lr_schedule.stable_steps") == 0
    assert plan.sections.output_dir == "/tmp/out"


def test_layers_of_the_first_and_last_stage(capsys):
    text = FOUR_NODES.replace("HL_PP=2", "HL_PP=4").replace("HL_DP=16", "HL_DP=8").replace("HL_EP=16", "HL_EP=8")
    for more in ("HL_FISRT_PP_STAGE_LAYERS=5 HL_LAST_PP_STAGE_LAYERS=1", "HL_LAST_PP_STAGE_LAYERS=1"):
        plan = launched(capsys, f"{text} {more} HL_MOE_SKIP_FIRST_LAYERS=1", "--model.model_config.mtp_depth", "0")[1]
        assert [len(plan.layers_of(stage)) for stage in range(4)] == [5, 5, 5, 1]
    with pytest.raises(ConfigError, match="leave 13 of 16 layers for 3 stages"):
        launched(capsys, f"{text} HL_FIRST_PP_STAGE_LAYERS=3")


def test_going_on_from_a_checkpoint(capsys, tmp_path):
    plan = launched(capsys, f"{EIGHT} HL_CHECKPOINTS_DIR={tmp_path}")[1]
    assert plan.sections.load_checkpoint == "" and plan.values["callbacks"][2]["directory"] == str(tmp_path)
    (tmp_path / "latest").touch()
    plan = launched(capsys, f"{EIGHT} HL_CHECKPOINTS_DIR={tmp_path}")[1]
    assert plan.sections.load_checkpoint == str(tmp_path) and plan.sections.resume_training is True


@pytest.mark.parametrize(
    "text,words",
    [
        ("HL_NUM_LAYER=3", "HL_NUM_LAYER=3: unknown variable; did you mean 'HL_NUM_LAYERS'?"),
        ("HL_DP=two", "HL_DP is 'two', but must be a whole number"),
        ("HL_GBS=30 HL_DP=4", "HL_GBS is 30, but must be a multiple of HL_MICRO_BATCH x HL_DP = 1 x 4 = 4"),
        ("HL_MBS=2 HL_MICRO_BATCH=1", "HL_MBS and HL_MICRO_BATCH mean the same"),
        ("HL_TOKEN_DROP=3", "HL_TOKEN_DROP is '3', but must be 0, 1 or 2"),
        ("HL_SEQ_PARALLEL=yes", "HL_SEQ_PARALLEL is 'yes', but must be 0 or 1"),
        ("HL_MOE_GROUPED_GEMM=0", "dropless experts are a grouped matmul"),
        ("HL_MOE_LAYER_RECOMPUTE=1", "experts are not computed again alone"),
        ("HL_RECOMPUTE_NUM_LAYERS=2", "a layer is computed again by itself"),
        ("HL_DATA_DIR_ROOT=/d", "HL_DATA_FILE_PREFIX is not set"),
        ("HL_DROPOUT=0.1", "DeepSeek's models have none"),
        ("HL_LOAD_DIR=/nowhere", "HL_LOAD_DIR is '/nowhere', which holds no checkpoint"),
        ("HL_TORCHRUN_NODE_RANK=1 HL_NUM_NODES=2 HL_DP=4", "HL_TORCHRUN_MASTER_ADDR is not set"),
        ("HL_NUM_NODES=2", "data_parallel x context_parallel x model_parallel x pipeline_stage must equal"),
        ("HL_EP=3", "expert_parallel must divide"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises(ConfigError) as error:
        pretrain_deepseek.run(["--dry_run"], variables(text))
    assert words in str(error.value)


def test_it_starts_the_launcher(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execvp", lambda program, words: started.append(words))
    pretrain_deepseek.run([], variables(EIGHT))
    assert started[0][1] == str(ROOT / "scripts/msrun_launcher.sh") and started[0][3:5] == ["8", "8"]
    with pytest.raises(ConfigError, match="HL_NUM_NODES is 4, but nothing says which machine this is"):
        pretrain_deepseek.run([], variables(FOUR_NODES))
    pretrain_deepseek.run([], variables(f"{FOUR_NODES} NNODES=4 NODE_RANK=1 MASTER_ADDR=10.0.0.1"))
    assert started[1][3:] == []


def test_the_shell_script(tmp_path):
    result = run_command(["bash", "-c", f"{EIGHT} bash {ROOT}/scripts/pretrain_deepseek.sh --dry_run"], tmp_path)
    assert result.returncode == 0 and "The plan is legal: 8 ranks, 8 sequences a step." in result.stdout, result.stderr
    result = run_command(["bash", "-c", f"HL_TPP=1 bash {ROOT}/scripts/pretrain_deepseek.sh"], tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1


def test_the_kill_switch(capsys):
    plan = launched(capsys, f"{EIGHT} HL_KILL_SWITCH=/shared/stop")[1]
    assert plan.sections.use_graceful_exit is True
