"""Every YAML is accepted, and every bad input ends as one sentence with file, key and value (issue 2, section 5)."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.bin_dataset.blended_dataset import parse_blend
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter
from mindformers_ext.config.check import check_classes
from mindformers_ext.config.data_check import check_data
from mindformers_ext.config.run import Run
from mindformers_ext.config.yaml_files import load_yaml, override
from mindformers_ext.errors import ConfigError
from mindformers_ext.training import register  # noqa: F401 (registers what the YAMLs name)

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "research").rglob("*.yaml"))
NAMES = {"deepseek3_tiny", "deepseek3_1b", "deepseek3_671b", "deepseek2_lite", "moonlight_16b", "kimi_k2"}


@pytest.fixture(autouse=True)
def model_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTER_PATH", str(ROOT / "research/deepseek3"))
    for name in ("MS_WORKER_NUM", "RANK_SIZE", "MS_SIMULATION_LEVEL"):
        monkeypatch.delenv(name, raising=False)


def config_of(name: str) -> dict:
    """A fresh copy of a pretraining YAML by its folder's name."""
    return copy.deepcopy(load_yaml(ROOT / f"research/deepseek3/{name}/pretrain_{name}.yaml"))


def error_of(config: dict) -> str:
    """The sentences that the check answers with."""
    with pytest.raises(ConfigError) as caught:
        check_classes(Run.of(config, "run.yaml"))
    assert all(sentence.startswith("run.yaml: ") for sentence in caught.value.sentences)
    return str(caught.value)


def changed(name: str, key: str, value: Any) -> dict:
    """A YAML with one key changed."""
    config = config_of(name)
    override(config, key, value, "run.yaml")
    return config


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPU_PARALLEL_FOLDER", ".")  # as scripts/msrun_launcher.sh starts the 8-rank one on CPU
    check_classes(Run.of(load_yaml(path), path))


def test_the_promised_yamls_are_there() -> None:
    assert {path.parent.name for path in YAMLS} >= NAMES
    assert json.loads((ROOT / "research/deepseek3/parallel_speed_up.json").read_text())


DATA = "train_dataset.data_loader.config"
COLUMNS = ["input_ids", "labels", "loss_mask", "position_ids", "actual_seq_len"]
PACKED = {
    f"{DATA}.eod": 1,
    f"{DATA}.create_compressed_eod_mask": True,
    "train_dataset.input_columns": COLUMNS,
    "train_dataset.construct_args_key": COLUMNS,
    "parallel.dataset_strategy": [[16, 1]] * 5,
}


def packed(**changes: Any) -> dict:
    """The 671B YAML with documents by their ends, changed."""
    config = config_of("deepseek3_671b")
    for key, value in (PACKED | changes).items():
        override(config, key, value, "run.yaml")
    return config


def test_documents_by_their_ends() -> None:
    check_classes(Run.of(packed(), "run.yaml"))
    for key, value, words in (
        (f"{DATA}.eod", -1, "create_compressed_eod_mask needs the id of the token"),
        ("train_dataset.input_columns", [*COLUMNS[4:], *COLUMNS[:4]], "the last column must be 'actual_seq_len'"),
        ("train_dataset.construct_args_key", COLUMNS[:4], "the model must be given 'actual_seq_len'"),
        (f"{DATA}.create_attention_mask", True, "the ends of documents replace it"),
        (
            "model.model_config.use_flash_attention",
            False,
            "and use_parallel it must be True",
        ),
        (f"{DATA}.eod_pad_length", 1024, "must not pass 1024 documents"),
        ("runner_config.batch_size", 8, "must not pass 1024 documents"),
        ("model.model_config.use_eod_attn_mask_compression", True, "create_compressed_eod_mask says it"),
    ):
        assert words in error_of(packed(**{key: value})), key


def test_the_671b_yaml_is_the_released_model() -> None:
    config = config_of("deepseek3_671b")
    degrees = config["parallel_config"]
    assert degrees["data_parallel"] * degrees["model_parallel"] * degrees["pipeline_stage"] == 1024
    model = config["model"]["model_config"]
    assert (model["num_layers"], model["bos_token_id"], model["eos_token_id"], model["vocab_size"]) == (
        61,
        0,
        1,
        129280,
    )
    assert sum(61 // 16 + extra for extra in model["offset"]) == 61
    tokens_a_step = 4096 * degrees["data_parallel"] * degrees["micro_batch_num"]
    rate = config["lr_schedule"]
    constant_end = rate["warmup_steps"] + rate["stable_steps"]
    assert constant_end * tokens_a_step == pytest.approx(10e12, rel=1e-6)
    assert rate["decay_steps"] * tokens_a_step == pytest.approx(4.3e12, rel=1e-6)
    assert (rate["final_start_step"] - constant_end - rate["decay_steps"]) * tokens_a_step == pytest.approx(
        333e9, rel=1e-4
    )


# Section, mistyped key, value, the key that was meant.
TYPOS = [
    ("", "out_put_dir", "x", "output_dir"),
    ("runner_config", "batchsize", 4, "batch_size"),
    ("optimizer", "weight_decy", 0.1, "weight_decay"),
    ("lr_schedule", "warmup_step", 3, "warmup_steps"),
    ("train_dataset", "drop_remainders", True, "drop_remainder"),
    ("train_dataset.data_loader", "size", [1], "sizes"),
    ("train_dataset.data_loader.config", "seqlength", 256, "seq_length"),
    ("context", "device_traget", "CPU", "device_target"),
    ("parallel", "gradient_mean", True, "gradients_mean"),
    ("parallel_config", "data_paralel", 2, "data_parallel"),
    ("recompute_config", "recomput", True, "recompute"),
    ("runner_wrapper", "use_clip_gradd", True, "use_clip_grad"),
    ("callbacks.0", "per_print_time", 1, "per_print_times"),
    ("callbacks.2", "save_checkpoint_step", 1, "save_checkpoint_steps"),
    ("model.model_config", "hidden_sizes", 256, "hidden_size"),
    ("moe_config", "expert_nums", 16, "expert_num"),
    ("model.arch", "typ", "X", "type"),
    ("trainer", "model_names", "x", "model_name"),
]


@pytest.mark.parametrize("section,typo,value,meant", TYPOS, ids=lambda item: str(item))
def test_an_unknown_key_names_the_nearest_legal_one(section: str, typo: str, value: Any, meant: str) -> None:
    sentence = error_of(changed("deepseek3_tiny", f"{section}.{typo}" if section else typo, value))
    assert f"{typo}: unknown key with value {value!r}" in sentence and repr(meant) in sentence
    assert section.replace(".0", "[0]").replace(".2", "[2]").removeprefix("model.") in sentence


BAD_VALUES = [
    ("runner_config.batch_size", 0, "at least 1"),
    ("runner_config.epochs", "two", "whole number"),
    ("runner_config.sink_mode", "yes", "True or False"),
    ("run_mode", "pretrain", "'train', 'finetune', 'eval', 'predict'"),
    ("optimizer.betas", [0.9, 1.5], "at most 1"),
    ("optimizer.betas", [0.9], "2 items"),
    ("optimizer.type", "AdamWW", "'AdamW'"),
    ("lr_schedule.learning_rate", -1e-4, "above 0"),
    ("lr_schedule.learning_rate", "2e-4", "a number"),  # YAML reads 2e-4 without a dot as a text
    ("context.device_target", "GPU", "'CPU', 'Ascend'"),
    ("parallel.parallel_mode", 7, "one of 0, 1, 2, 3"),
    ("parallel_config.data_parallel", 0, "at least 1"),
    ("callbacks.0.type", "TrainingMetric", "'TrainingMetrics'"),
    ("train_dataset.data_loader.sizes", [8, 0], "3 items"),
    ("train_dataset.data_loader.config.seq_length", 128, "must equal model.model_config.seq_length 256"),
    ("model.model_config.qk_rope_head_dim", 15, "even"),
    ("model.model_config.theta", 1, "above 1"),
    ("model.model_config.eos_token_id", 4096, "vocab_size = 4096"),
    ("model.model_config.compute_dtype", "float64", "'float32', 'float16', 'bfloat16'"),
    ("model.model_config.compute_dtype", "float16", "on CPU it must be 'float32', or 'bfloat16'"),
    ("model.model_config.softmax_compute_type", "bfloat16", "on CPU it must be 'float32'"),
    ("model.model_config.type", "DeepseekV9Config", "the class of its type"),
    ("moe_config.topk_method", "best", "'greedy'"),
    ("moe_config.num_experts_chosen", 17, "expert_num = 16"),
    ("moe_config.n_group", 3, "must divide expert_num = 16"),
    ("runner_wrapper.scale_sense", 0, "at least 1"),
]


@pytest.mark.parametrize("key,value,rule", BAD_VALUES, ids=lambda item: str(item))
def test_a_bad_value_names_key_value_and_rule(key: str, value: Any, rule: str) -> None:
    sentence = error_of(changed("deepseek3_tiny", key, value))
    assert key.split(".")[-1] in sentence and str(value) in sentence and rule in sentence


INDIVISIBLE = [
    ("model.model_config.num_heads", 126, "model_parallel must divide num_heads"),
    ("moe_config.expert_num", 252, "expert_parallel must divide moe_config.expert_num"),
    ("parallel_config.expert_parallel", 128, "128 does not divide 64; nearest legal: 64"),
    ("parallel_config.pipeline_stage", 64, "num_layers is 61"),
    ("parallel_config.micro_batch_num", 8, "at least as many micro-batches as stages"),
    ("recompute_config.recompute", [1, 2], "a list of 16 numbers"),
    ("parallel.dataset_strategy", [[8, 1]], "data_parallel is 16"),
    ("context.device_target", "CPU", "start it with scripts/msrun_launcher.sh"),
    ("parallel.gradients_mean", True, "divided by data_parallel = 16 a second time"),
    ("context.mode", 1, "PyNative mode has no graph that could be split"),
    ("parallel.parallel_mode", 2, "does not search strategies"),
    ("parallel.parallel_mode", 3, "the model splits nothing by hand"),
    ("parallel.parallel_mode", "stand_alone", "every process trains a model of its own"),
    ("parallel.parallel_mode", 0, "would be the sum of data_parallel means; nearest legal: True"),
]


@pytest.mark.parametrize("key,value,rule", INDIVISIBLE, ids=lambda item: str(item))
def test_degrees_that_do_not_fit(key: str, value: Any, rule: str) -> None:
    config = changed("deepseek3_671b", key, value)
    if key.endswith("num_heads"):
        config["model"]["model_config"].pop("n_kv_heads")
    if key.endswith("expert_num"):
        config["moe_config"] |= {"n_group": 1, "topk_group": 1}
    if key.endswith("pipeline_stage"):
        config["model"]["model_config"]["offset"] = 0
    assert rule in error_of(config)


def test_the_number_of_processes_must_be_the_product_of_the_degrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MS_WORKER_NUM", "8")
    check_classes(Run.of(config_of("deepseek3_1b"), "run.yaml"))
    sentence = error_of(config_of("deepseek3_671b"))
    assert "= 1024 and there are 8" in sentence


@pytest.fixture
def data_config(tmp_path: Path) -> dict:
    """The tiny YAML on 600 random tokens below 4096 in tmp_path."""
    with IndexedDatasetWriter(tmp_path / "d_text_document", np.uint16) as writer:
        writer.add_document(np.random.default_rng(0).integers(0, 4096, 599))
        writer.add_document(np.array([4095]))
    config = config_of("deepseek3_tiny")
    config["processor"]["tokenizer"].pop("tokenizer_file")
    config["train_dataset"]["data_loader"]["config"]["data_path"] = ["1", str(tmp_path / "d_text_document")]
    return config


def data_error(config: dict) -> str:
    """The sentence that check_data answers with."""
    with pytest.raises(ConfigError) as caught:
        check_data(Run.of(config, "run.yaml"), "train_dataset")
    return str(caught.value)


def test_good_data_is_accepted(data_config: dict) -> None:
    check_data(Run.of(data_config, "run.yaml"), "train_dataset")


def test_a_missing_data_file(data_config: dict, tmp_path: Path) -> None:
    data_config["train_dataset"]["data_loader"]["config"]["data_path"] = ["1", str(tmp_path / "nothing")]
    sentence = data_error(data_config)
    assert sentence.startswith("run.yaml: train_dataset.data_loader.config.data_path") and "nothing.idx" in sentence


def test_a_truncated_data_file(data_config: dict, tmp_path: Path) -> None:
    os.truncate(tmp_path / "d_text_document.bin", 100)
    assert "100 bytes" in data_error(data_config)


def test_a_sequence_longer_than_the_data(data_config: dict) -> None:
    data_config["train_dataset"]["data_loader"]["config"]["seq_length"] = 1024
    sentence = data_error(data_config)
    assert "seq_length is 1024" in sentence and "only 600 tokens" in sentence


def test_token_ids_outside_the_vocabulary(data_config: dict) -> None:
    data_config["model"]["model_config"]["vocab_size"] = 4000
    sentence = data_error(data_config)
    assert "vocab_size is 4000" in sentence and "token id 409" in sentence


def test_a_tokenizer_larger_than_the_vocabulary(data_config: dict, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    file = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE(vocab={chr(i): i for i in range(5000)}, merges=[])).save(str(file))
    data_config["processor"]["tokenizer"]["tokenizer_file"] = str(file)
    sentence = data_error(data_config)
    assert "vocab_size is 4096" in sentence and "5000 tokens" in sentence and str(file) in sentence


@pytest.mark.parametrize("text", [None, "{not json", ""])
def test_a_tokenizer_that_cannot_be_read(data_config: dict, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "broken.json"
    if text is not None:
        file.write_text(text)
    data_config["processor"]["tokenizer"]["tokenizer_file"] = str(file)
    assert "broken.json" in data_error(data_config)


@pytest.mark.parametrize(
    "data_path,prefixes",
    [("a", ["a"]), (["a"], ["a"]), (["0.3", "a", "0.7", "b"], ["a", "b"]), ([1, "a"], ["a"]), (["a", "b"], ["a", "b"])],
)
def test_prefixes_of_a_blend(data_path: Any, prefixes: list[str]) -> None:
    assert parse_blend(data_path)[0] == prefixes


def test_yaml_files_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    for text, words in (("a: [1", "not valid YAML"), ("- 1\n- 2", "mapping of sections"), ("", "mapping of sections")):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=words) as caught:
            load_yaml(broken)
        assert str(broken) in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(tmp_path / "missing.yaml")
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_yaml(broken)


def test_base_config_is_inherited(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: {x: 1, y: 2}\nb: 3\n")
    (tmp_path / "top.yaml").write_text("base_config: base.yaml\na: {y: 5}\n")
    assert load_yaml(tmp_path / "top.yaml") == {"a": {"x": 1, "y": 5}, "b": 3}


def test_overrides_reach_sections_lists_and_new_sections() -> None:
    config: dict = {"a": {"b": 1}, "items": [{"k": 1}]}
    override(config, "a.b", 2, "run.yaml")
    override(config, "items.0.k", 3, "run.yaml")
    override(config, "new.section.key", 4, "run.yaml")
    assert config == {"a": {"b": 2}, "items": [{"k": 3}], "new": {"section": {"key": 4}}}
    for key in ("a.b.c", "items.5.k", "items.k", "items.0"):
        with pytest.raises(ConfigError, match=f"--{key}"):
            override(config, key, 1, "run.yaml")


def test_pynative_mode_recomputes_nothing() -> None:
    config = changed("deepseek3_tiny", "recompute_config.recompute", True)
    check_classes(Run.of(config, "run.yaml"))
    override(config, "context.mode", 1, "run.yaml")
    assert "recompute_config.recompute is True, but PyNative mode would count the tokens" in error_of(config)
