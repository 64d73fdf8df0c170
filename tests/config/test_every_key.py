"""Every key of every shipped YAML with every kind of wrong value: a sentence each; nothing wrong is accepted."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.config.run import Run
from mindformers_ext.config.strategy_rules import check_run
from mindformers_ext.config.yaml_files import load_yaml, override
from mindformers_ext.errors import ConfigError

YAMLS = sorted((Path(__file__).resolve().parents[2] / "research").rglob("*.yaml"))
VALUES = (None, -1, "x", [], {}, 1e99, True)
# What is right all the same, by value: switches, sections with their defaults, texts, keys that may be empty.
RIGHT = {
    "True": """callbacks.N.async_save context.save_graphs model.model_config.input_sliced_sig
        model.model_config.return_extra_loss model.model_config.use_flash_attention
        model.model_config.use_fused_cross_entropy model.model_config.use_fused_rms_norm
        model.model_config.use_fused_rope model.model_config.use_fused_swiglu moe_config.balance_via_topk_bias
        moe_config.enable_sdrop moe_config.group_wise_a2a moe_config.norm_topk_prob moe_config.use_fused_ops_permute
        moe_config.use_fused_ops_topkrouter moe_config.use_gating_sigmoid moe_config.use_gmm parallel.enable_alltoall
        parallel.enable_parallel_optimizer parallel.gradients_mean
        parallel.parallel_optimizer_config.gradient_accumulation_shard parallel.pipeline_config.pipeline_interleave
        parallel_config.use_seq_parallel
        parallel_config.vocab_emb_dp recompute_config.mp_comm_recompute
        recompute_config.parallel_optimizer_comm_recompute recompute_config.recompute
        recompute_config.recompute_slice_activation recompute_config.select_recompute resume_training
        runner_config.sink_mode runner_wrapper.use_clip_grad DATASET.drop_remainder train_dataset.numa_enable
        DATASET.data_loader.config.create_attention_mask
        eval_dataset.data_loader.config.eod_mask_loss eval_dataset.data_loader.config.reset_attention_mask
        eval_dataset.data_loader.config.reset_position_ids use_parallel""",
    "None": """context.ascend_config context.ascend_config.parallel_speed_up_json_path context.jit_config
        context.graph_kernel_flags
        context.max_device_memory eval_dataset eval_dataset.data_loader eval_dataset.data_loader.config.data_path
        DATASET.data_loader.config.split eval_dataset.input_columns eval_dataset_task load_checkpoint
        lr_schedule.final_lr lr_schedule.final_start_step
        model.model_config.extend_method model.model_config.intermediate_size
        model.model_config.max_position_embeddings model.model_config.n_kv_heads model.model_config.q_lora_rank
        model.model_config.scaling_factor moe_config.aux_loss_factors moe_config.expert_group_size
        moe_config.n_group moe_config.topk_group parallel.dataset_strategy processor processor.tokenizer
        processor.tokenizer.tokenizer_file""",
    "{}": """context context.ascend_config context.jit_config eval_dataset model.model_config.scaling_factor moe_config
        parallel parallel.parallel_optimizer_config parallel_config processor
        processor.tokenizer recompute_config runner_config""",
    "'x'": """callbacks.N.base_model callbacks.N.prefix context.ascend_config.parallel_speed_up_json_path
        context.save_graphs_path DATASET.data_loader.config.data_path load_checkpoint
        output_dir processor.tokenizer.tokenizer_file trainer.model_name""",
    "[]": "callbacks moe_config.aux_loss_factors",
    "-1": "lr_schedule.total_steps model.model_config.ignore_token_id runner_config.sink_size",
}


def keys(value: Any, name: str = "") -> Iterator[str]:
    """Every key below a value, sections too, items of lists by their number."""
    if name:
        yield name
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(value, dict):
            yield from keys(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(inner, dict):
            for word, deeper in inner.items():
                yield from keys(deeper, f"{name}.{key}.{word}")


def general(key: str) -> set[str]:
    """The names under which RIGHT may hold a key."""
    parts = key.split(".")
    dataset = ".".join(["DATASET", *parts[1:]]) if parts[0] in ("train_dataset", "eval_dataset") else key
    return {key, dataset, ".".join(["callbacks", "N", *parts[2:]]) if parts[0] == "callbacks" and parts[1:] else key}


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_a_wrong_value_is_refused(path: Path) -> None:
    values = load_yaml(path)
    accepted = []
    for key in keys(values):
        for value in VALUES:
            changed = copy.deepcopy(values)
            override(changed, key, value, path)
            try:
                wrong = check_run(Run.of(changed, path))
            except ConfigError as error:
                wrong = error.sentences
                assert all(str(path) in sentence for sentence in wrong)
            if not wrong and not general(key) & set(RIGHT.get(repr(value), "").split()):
                accepted.append((key, value))
    assert accepted == []


def test_all_that_is_wrong_is_said_at_once() -> None:
    """A stranger's YAML is mended in one round: every unknown key and wrong value has its sentence."""
    values = load_yaml(next(path for path in YAMLS if path.stem == "pretrain_deepseek3_tiny"))
    wrong = {
        "runner_config.batchsize": 4,
        "model.model_config.hidden_size": True,
        "moe_config.use_gmm": "x",
        "optimizer.betas": [0.9],
        "lr_schedule.learning_rat": 1,
        "callbacks.0.per_print_time": 1,
        "parallel_config.data_paralel": 2,
        "repetition_penalty": 1.5,
    }
    for key, value in wrong.items():
        override(values, key, value, "run.yaml")
    with pytest.raises(ConfigError) as caught:
        Run.of(values, "run.yaml")
    words = "\n".join(caught.value.sentences)
    assert len(caught.value.sentences) == len(wrong)
    assert all(key.split(".")[-1] in words for key in wrong)


def test_numbers_of_a_yaml(tmp_path: Path) -> None:
    """1e-4 is a number (PyYAML alone reads a text), a quoted one stays a text, a key given twice is refused."""
    file = tmp_path / "numbers.yaml"
    file.write_text("a: 1e-4\nb: '1e-4'\nc: 2E3\nd: -.5e-1\ne: 1_000\n")
    assert load_yaml(file) == {"a": 1e-4, "b": "1e-4", "c": 2000.0, "d": -0.05, "e": 1000}
    file.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(ConfigError, match="the key 'a' is given twice"):
        load_yaml(file)
