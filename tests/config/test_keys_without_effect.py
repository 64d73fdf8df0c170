"""Every key that a YAML may hold takes effect in a named place, or is refused with the reason."""

import dataclasses
import importlib.util
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mindformers_ext.config.model import ELSEWHERE, FAMILIES, MoeConfig
from mindformers_ext.config.run import Run, Sections
from mindformers_ext.config.sections import Callback, Optimizer, Schedule, Wrapper
from mindformers_ext.config.strategy_rules import check_run
from mindformers_ext.config.typed import (
    Choice,
    Only,
    Reader,
    annotations,
    is_list_of_sections,
    is_same,
    is_section,
    options,
)
from mindformers_ext.config.yaml_files import load_yaml, override
from mindformers_ext.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "research" / "deepseek3" / "deepseek3_tiny" / "pretrain_deepseek3_tiny.yaml"

# Section class -> where -> keys that take effect there: a file of ours, which says the word; a test of ours; or a file
# of MindFormers 1.9.0 or MindSpore 2.9.0 with the line of each key.
EFFECTS = {
    "Sections": {
        "mindformers_ext/training/run_modes.py": """
            output_dir run_mode load_checkpoint resume_training input_data processor eval_dataset
            eval_dataset_task context callbacks model runner_wrapper data_skip_steps do_eval
            eval_step_interval""",
        "mindformers_ext/training/start.py": "use_parallel",
        "mindformers_ext/training/resuming_trainer.py": """
            ignore_data_skip use_skip_data_by_global_norm use_graceful_exit max_train_hours max_step_minutes
            recipe check_for_nan_in_loss_and_grad""",
        "mindformers_ext/training/bad_steps.py": "monitor_config",
        "mindformers/trainer/trainer.py": """
            seed:293 trainer:310 parallel:301 profile:1116 profile_communication:1133 profile_memory:1141
            profile_pipeline:1139 init_start_profile:1132 mstx:1147 profile_start_step:1120 profile_stop_step:1125
            profiler_level:1143 profile_rank_ids:1138""",
        "mindformers/trainer/base_trainer.py": """
            runner_config:203 train_dataset:1038 train_dataset_task:424 optimizer:659 lr_schedule:640
            grouped_lr_schedule:600 lr_scale:629 lr_scale_factor:630
            tensorboard:1327""",
        "mindformers/core/parallel_config.py": "parallel_config:60 recompute_config:54 moe_config:40 swap_config:47",
        "mindformers/core/context/build_context.py": "train_precision_sync:621 infer_precision_sync:625",
        "mindformers/dataset/utils.py": "auto_tune:25 filepath_prefix:26 autotune_per_step:27",
    },
    "RunnerConfig": {
        "mindformers_ext/config/run.py": "batch_size gradient_accumulation_steps",
        "mindformers/trainer/utils.py": "epochs:194 sink_mode:202 sink_size:203",
    },
    "Trainer": {
        "mindformers/trainer/base_trainer.py": "model_name:128",
        "mindformers/tools/register/register.py": "type:333",
    },
    "Model": {
        "mindformers_ext/config/run.py": "model_config",
        "mindformers_ext/config/run_rules.py": "arch",
    },
    "Arch": {
        "mindformers_ext/config/run_rules.py": "type auto_register",
    },
    "ParallelConfig": {
        "mindformers_ext/config/run.py": """
            data_parallel model_parallel context_parallel expert_parallel pipeline_stage micro_batch_num
            use_seq_parallel vocab_emb_dp""",
        "research/deepseek3/sharding.py": "gradient_aggregation_group",
    },
    "RecomputeConfig": {
        "research/deepseek3/sharding.py": """
            recompute select_recompute mp_comm_recompute parallel_optimizer_comm_recompute
            recompute_slice_activation""",
    },
    "SwapConfig": {},
    "OptimizerShards": {
        "mindspore/parallel/_auto_parallel_context.py": """
            gradient_accumulation_shard:63 parallel_optimizer_threshold:64 optimizer_weight_shard_size:1375""",
    },
    "PipelineConfig": {
        "mindformers_ext/config/strategy_rules.py": "pipeline_interleave",
        "mindformers_ext/config/run.py": "pipeline_scheduler",
    },
    "ParallelContext": {
        "mindformers_ext/config/strategy_rules.py": "parallel_mode full_batch dataset_strategy pipeline_config",
        "mindformers_ext/config/run.py": "enable_parallel_optimizer parallel_optimizer_config",
        "mindspore/parallel/_auto_parallel_context.py": """
            gradients_mean:1352 gradient_fp32_sync:1353 enable_alltoall:1378 force_fp32_communication:1369
            parameter_broadcast:1362 all_reduce_fusion_config:1373 comm_fusion:1380 communi_parallel_mode:1374""",
    },
    "JitConfig": {
        "mindspore/context.py": "jit_level:447 infer_boost:447",
    },
    "AscendConfig": {
        "mindformers/core/context/build_context.py": "parallel_speed_up_json_path:303 precision_mode:247",
        "mindspore/context.py": """
            atomic_clean_policy:332 op_precision_mode:336 op_debug_option:346 topo_order:345 jit_compile:331
            matmul_allow_hf32:333 conv_allow_hf32:334 hccl_watchdog:344 ge_options:337
            host_scheduling_max_threshold:339""",
    },
    "Context": {
        "mindformers_ext/config/run.py": "device_target",
        "mindformers_ext/training/start.py": "graph_kernel_flags",
        "mindformers/core/context/build_context.py": """
            max_device_memory:181 jit_config:316 ascend_config:294 mode:316 mempool_block_size:184
            memory_optimize_level:187 max_call_depth:231 device_id:157 save_graphs:214 save_graphs_path:218
            dataset_broadcast_opt_level:300 affinity_cpu_list:717 affinity_config:712""",
    },
    "MonitorConfig": {
        "mindformers/trainer/trainer.py": """
            monitor_on:337 dump_path:339 step_interval:343""",
        "mindformers_ext/training/bad_steps.py": """
            global_norm_spike_threshold global_norm_spike_factor global_norm_spike_window
            global_norm_spike_count_threshold""",
        "mindformers/core/callback/callback.py": """
            target:1235 invert:1236 print_struct:1251 optimizer_state_format:1246 weight_state_format:1247
            throughput_baseline:1250 stable_rank_config:1190""",
    },
    "Tensorboard": {
        "mindformers/utils/tensorboard.py": """
            tensorboard_dir:188 tensorboard_queue_size:110 log_loss_scale_to_tensorboard:23
            log_timers_to_tensorboard:22""",
    },
    "MegatronConfig": {
        "mindformers_ext/bin_dataset/loader_config.py": """
            seq_length seed data_path train_data_path valid_data_path test_data_path conversations
            compressed_eod_mask_length""",
        "mindformers_ext/bin_dataset/gpt_dataset.py": """
            random_seed split eod pad reset_position_ids reset_attention_mask eod_mask_loss create_attention_mask
            create_compressed_eod_mask eod_pad_length
            drop_last_partial_validation_sequence add_extra_token_to_sequence path_to_cache s3_cache_path""",
        "mindformers_ext/bin_dataset/blended_dataset.py": "num_dataset_builder_threads mid_level_dataset_surplus",
    },
    "MegatronLoader": {
        "mindformers_ext/data/megatron_dataloader.py": "sizes config phase datasets_type leave_out",
        "mindformers/tools/register/register.py": "type:333 auto_register:362",
    },
    "Dataset": {
        "mindformers_ext/training/run_modes.py": "num_parallel_workers",
        "mindformers/trainer/base_trainer.py": "data_loader:869 construct_args_key:926",
        "mindformers/dataset/causal_language_model_dataset.py": """
            input_columns:150 output_columns:349 drop_remainder:149 token_monitor:367 token_monitor_config:370""",
        "mindformers/dataset/base_dataset.py": "prefetch_size:52 numa_enable:53",
        "mindformers/dataset/general_dataset.py": "python_multiprocessing:60",
        "mindformers/dataset/multi_turn_dataset.py": "tokenizer:137",
    },
    "DatasetTask": {
        "mindformers_ext/config/run_rules.py": "dataset_config",
        "mindformers/tools/register/register.py": "type:333 auto_register:362",
    },
    "Processor": {
        "mindformers_ext/config/data_check.py": "tokenizer",
    },
    "Tokenizer": {
        "mindformers_ext/config/data_check.py": "tokenizer_file",
    },
    "AdamW": {
        "mindformers/core/optim/__init__.py": """
            use_fused:195 amsgrad:202 maximize:203 betas:199 eps:200 swap:204 learning_rate:198 weight_decay:201""",
        "mindformers/tools/register/register.py": "type:333 auto_register:362",
    },
    "Muon": {
        "mindformers_ext/training/muon.py": """
            learning_rate weight_decay matched_adamw_rms momentum nesterov ns_steps adamw_betas adamw_eps
            qk_clip_threshold""",
        "mindformers/tools/register/register.py": "type:333 auto_register:362",
    },
    "Recipe": {
        "mindformers_ext/config/recipe.py": "micro_batches",
        "mindformers_ext/training/recipe.py": "mtp_loss_factor topk_bias_update_rate",
        "mindformers_ext/training/resuming_trainer.py": "ema_decay",
    },
    "WarmUp": {
        "mindformers/core/lr/lr_schedule.py": """
            learning_rate:187 warmup_steps:177 warmup_ratio:177 warmup_lr_init:188 total_steps:177""",
        "mindformers/tools/register/register.py": "type:333 auto_register:362",
    },
    "WarmUpCosine": {
        "mindformers/core/lr/lr_schedule.py": "lr_end:474 num_cycles:191 decay_steps:179 decay_ratio:179",
    },
    "WarmupStableCosineSteps": {
        "tests/training/test_train_wrapper.py::test_deepseek_v3_schedule": """
            learning_rate lr_end warmup_steps stable_steps decay_steps final_lr final_start_step""",
        "mindformers/tools/register/register.py": "type:333",
    },
    "GroupedSchedule": {
        "mindformers/trainer/base_trainer.py": "default:600 grouped:604",
    },
    "LossScale": {
        "mindformers/wrapper/build_wrapper.py": "type:60",
        "mindspore/nn/wrap/loss_scale.py": "loss_scale_value:151",
    },
    "TrainOneStep": {
        "mindformers_ext/training/wrapper.py": "scale_sense use_clip_grad max_grad_norm",
        "mindformers/tools/register/register.py": "type:333 auto_register:362",
    },
    "TrainingMetrics": {
        "mindformers_ext/training/metrics.py": """
            output_dir tensorboard_dir per_print_times device_peak_tflops max_skipped_steps monitors""",
        "mindformers/tools/register/register.py": "type:333",
    },
    "Monitors": {
        "mindformers_ext/training/monitors.py": """
            gradient_norms weight_norms update_norms moment_norms experts times attention_logits""",
    },
    "CheckpointMonitor": {
        "mindformers_ext/training/checkpoint_monitor.py": """
            prefix directory save_checkpoint_steps keep_checkpoint_max async_save checkpoint_format keep_every_steps
            check_health embedding_norm_factor max_expert_bias""",
        "mindformers/tools/register/register.py": "type:333",
    },
    "AdapterMonitor": {
        "mindformers_ext/training/adapter_monitor.py": "base_model",
    },
    "TopkBiasBalance": {
        "mindformers_ext/training/topk_bias_callback.py": "balance_via_topk_bias",
        "mindformers/tools/register/register.py": "type:333",
    },
    "LossMonitor": {
        "mindformers/core/callback/callback.py": "per_print_times:390",
        "mindformers/tools/register/register.py": "type:333",
    },
    "ParallelCheck": {
        "mindformers_ext/training/parallel_check.py": "folder",
        "mindformers/tools/register/register.py": "type:333",
    },
    "ModelConfig": {
        "research/deepseek3/deepseek2_model.py": """
            hidden_size num_layers num_heads intermediate_size vocab_size kv_lora_rank q_lora_rank qk_rope_head_dim
            qk_nope_head_dim v_head_dim tie_word_embeddings rms_norm_eps initializer_range compute_dtype
            track_max_attention_logit layernorm_compute_type param_init_type pad_token_id ignore_token_id
            input_sliced_sig moe_config""",
        "research/deepseek3/rope.py": "max_position_embeddings rotary_dtype theta",
        "research/deepseek3/balance_loss.py": "return_extra_loss",
        "research/deepseek3/deepseek3_model.py": "mtp_loss_factor",
        "research/deepseek3/hf_config.py": "extend_method scaling_factor bos_token_id",
        "mindformers_ext/layers/fused_ops.py": """
            softmax_compute_type use_flash_attention use_fused_rope use_fused_swiglu use_fused_rms_norm
            use_fused_cross_entropy""",
        "mindformers_ext/layers/router.py": "router_dense_type",
        "mindformers_ext/config/strategy_rules.py": "pp_interleave_num",
        "mindformers_ext/layers/moe_dispatch.py": "seq_length",
        "mindformers_ext/training/run_modes.py": "eos_token_id max_decode_length do_sample top_k top_p temperature",
        "mindformers_ext/config/model.py": "n_kv_heads multiple_of offset pet_config",
        "mindformers_ext/config/run_rules.py": "batch_size checkpoint_name_or_path",
    },
    "V3ModelConfig": {
        "research/deepseek3/deepseek3_model.py": "mtp_depth",
    },
    "V32ModelConfig": {
        "research/deepseek3/sparse_attention.py": "index_n_heads index_head_dim index_topk indexer_loss_factor",
        "mindformers_ext/config/model.py": "sparse_attention",
    },
    "YarnConfig": {
        "research/deepseek3/rope.py": """
            factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim""",
    },
    "LoraConfig": {
        "research/deepseek3/deepseek2_model.py": "lora_rank",
        "research/deepseek3/lora.py": "lora_alpha lora_dropout",
        "mindformers_ext/config/model.py": "target_modules",
    },
    "MoeConfig": {
        "research/deepseek3/deepseek2_model.py": """
            expert_num shared_expert_num shared_expert_split moe_intermediate_size""",
        "research/deepseek3/balance_loss.py": """
            num_experts_chosen use_gating_sigmoid n_group topk_group aux_loss_types aux_loss_factors z_loss_factor""",
        "mindformers_ext/layers/fused_ops.py": """
            topk_method norm_topk_prob routed_scaling_factor use_fused_ops_topkrouter use_fused_ops_permute""",
        "research/deepseek3/sharding.py": "npu_nums_per_device",
        "mindformers_ext/layers/exact_experts.py": "dropless_rows dropless_row_factor",
        "mindformers_ext/layers/router.py": "balance_via_topk_bias topk_bias_update_rate",
        "mindformers_ext/layers/moe_dispatch.py": """
            use_gmm moe_token_dispatcher_type capacity_factor expert_group_size enable_sdrop
            group_wise_a2a""",
        "mindformers_ext/config/model.py": "first_k_dense_replace aux_loss_factor routing_policy",
    },
}

# Section class -> keys that are known, and refused with any but one value.
REFUSED = {
    "Sections": """
        micro_batch_interleave_num calculate_per_token_loss eval_epoch_interval
        eval_callbacks metric load_ckpt_format transform_process_num reshard_worker_num auto_trans_ckpt
        only_save_strategy load_ckpt_async remove_redundancy transform_by_rank balanced_load
        use_checkpoint_health_monitor resume_by_last_timestamp_ckpt src_strategy_path_or_dir checkpoint
        npu_num_per_node remote_save_url pretrained_model_dir use_legacy adapter_id
        generation_config predict_batch_size save_file top_k postprocess_use_numpy trust_remote_code profile_level
        print_separate_loss layer_scale layer_decay exclude_cann_cpu push_to_hub""",
    "RunnerConfig": "stop_step num_classes",
    "Model": "pretrained_model_dir generation_config",
    "WarmUp": "warmup_epochs lr_end",
    "CheckpointMonitor": "integrated_save",
    "Dataset": """
        repeat batch_size micro_batch_num seed filepath_prefix autotune_per_step auto_tune profile do_eval eod_reset
        eod_token_id dynamic_batch divisor remainder pad_token_id input_sliced_sig dataset_dir type max_length
        mixup_op text_transforms image_transforms""",
    "MegatronLoader": "shuffle first_sample column_names",
    "MegatronConfig": """
        mmap_bin_files""",
    "Processor": "type return_tensors",
    "Tokenizer": "type auto_register vocab_file",
    "Context": """
        deterministic variable_memory_max_size memory_offload inter_op_parallel_num runtime_num_threads op_timeout
        jit_syntax_level save_compile_cache load_compile_cache precompile_only enable_auto_mixed_precision
        enable_sparse enable_reduce_precision enable_profiling check_bprop grad_for_scalar pynative_synchronize
        reserve_class_name_in_scope profiling_options print_file_path env_config_path auto_tune_mode""",
    "JitConfig": "exec_mode jit_syntax_level",
    "AscendConfig": "exception_dump",
    "ParallelContext": """
        search_mode auto_parallel_search_mode sharding_propagation auto_pipeline strategy_ckpt_config
        strategy_ckpt_save_file strategy_ckpt_load_file group_ckpt_save_file optimizer_weight_shard_aggregated_save
        loss_repeated_mean pipeline_result_broadcast device_num global_rank pipeline_stages pipeline_segments
        grad_accumulation_step optimizer_weight_shard_size dump_local_norm dump_device_local_norm
        dump_local_norm_path init_param_in_compile auto_parallel_new_interface""",
    "ParallelConfig": "mem_coeff seq_split_num ulysses_degree_in_cp context_parallel_algo optimizer_shard",
    "RecomputeConfig": "select_comm_recompute select_recompute_exclude select_comm_recompute_exclude",
    "SwapConfig": "swap layer_swap op_swap default_prefetch",
    "MonitorConfig": """
        local_loss_format device_local_loss_format max_attention_logit_format check_for_global_norm
        health_checkpoint local_norm_format device_local_norm_format""",
    "TrainOneStep": "local_norm",
    "Tensorboard": "log_expert_load_to_tensorboard",
    "ModelConfig": "use_past mtp_depth",
    "MoeConfig": "expert_model_parallel",
}

# Keys of MindFormers 1.9's DeepSeek YAMLs that are known here and cannot have the value that they have there.
OTHER_VALUES = {
    "auto_trans_ckpt": "load_checkpoint",
    "context.affinity_cpu_list": "a mapping of keys",
    "lr_schedule.lr_end": "CosineWithWarmUpLR has lr_end",
    "model.model_config.offset": "a number of layers per pipeline stage",
    "model.model_config.scaling_factor": "a mapping of keys",
    "parallel.parallel_mode": "'semi_auto_parallel'",
    "parallel.pipeline_config.pipeline_scheduler": "'1f1b'",
    "parallel.strategy_ckpt_config": "sharding.py",
    "pretrained_model_dir": "given as load_checkpoint",
    "train_dataset.seed": "at the top",
    "use_legacy": "layers",
}


def is_only(hint: Any) -> bool:
    """True for a key of which one value works."""
    return any(isinstance(meta, Only) for meta in getattr(hint, "__metadata__", ()))


def inner_sections(cls: type) -> Iterator[type]:
    """The sections inside one, and the classes that it may name."""
    for hint in annotations(cls).values():
        for option in options(hint):
            section = typing.get_args(option)[0] if is_list_of_sections(option) else option
            if is_section(section):
                yield from section.kinds.values() if issubclass(section, Choice) else [section]


def known() -> dict[type, dict[str, Any]]:
    """Every section class with the keys that it adds to those of its parents."""
    found: dict[type, dict[str, Any]] = {}
    waiting = [Sections, *FAMILIES.values(), MoeConfig]
    while waiting:
        cls = waiting.pop()
        parents = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
        inherited = {key: hint for base in reversed(parents) for key, hint in annotations(base).items()}
        found[cls] = {
            key: hint
            for key, hint in annotations(cls).items()
            if key not in inherited or (is_only(inherited[key]) and not is_only(hint))
        }
        waiting += [inner for inner in inner_sections(cls) if inner not in found]
    return found


KNOWN = known()


def source(where: str) -> str:
    """The text of a file of ours, of MindFormers or of MindSpore."""
    package = where.partition("/")[0]
    folder = ROOT if (ROOT / package).exists() else Path(importlib.util.find_spec(package).origin).parents[1]
    return (folder / where).read_text(encoding="utf-8")


def test_no_key_is_left_out() -> None:
    """A key that is added needs a place in the table, one that goes leaves it."""
    names = [cls.__name__ for cls in KNOWN]
    assert sorted(names) == sorted({*names, *EFFECTS, *REFUSED})
    for cls, keys in KNOWN.items():
        effective = [
            word.partition(":")[0] for words in EFFECTS.get(cls.__name__, {}).values() for word in words.split()
        ]
        assert sorted([*effective, *REFUSED.get(cls.__name__, "").split()]) == sorted(keys), cls.__name__
        assert sorted(REFUSED.get(cls.__name__, "").split()) == sorted(
            key for key, hint in keys.items() if is_only(hint)
        )


@pytest.mark.parametrize("section", EFFECTS)
def test_every_place_speaks_of_its_keys(section: str) -> None:
    for where, words in EFFECTS[section].items():
        file, _, test = where.partition("::")
        text = source(file)
        if test:
            assert f"def {test}(" in text
            continue
        lines = text.splitlines()
        for word in words.split():
            key, _, line = word.partition(":")
            assert re.search(rf"\b{key}\b", lines[int(line) - 1] if line else text), f"{where}: {word}"


@pytest.mark.parametrize("section", REFUSED)
def test_every_other_value_is_refused(section: str) -> None:
    (cls,) = (cls for cls in KNOWN if cls.__name__ == section)
    for key in REFUSED[section].split():
        one = next(meta for meta in KNOWN[cls][key].__metadata__ if isinstance(meta, Only))
        for value in (None, True, False, 0, 1, 2, 0.5, "text", [1], {"a": 1}):
            reader = Reader()
            reader.convert(KNOWN[cls][key], value, key)
            if is_same(value, one.value):
                assert reader.faults == []
            else:
                (sentence,) = reader.faults
                assert sentence.startswith(f"{key} is ") and one.why in sentence


def test_it_is_refused_in_a_yaml() -> None:
    """One of every section, at its place."""
    asked = {
        "eval_epoch_interval": 1,
        "checkpoint": {"load_path": "x"},
        "model.generation_config": {"top_k": 1},
        "runner_config.stop_step": 5,
        "parallel_config.mem_coeff": 0.5,
        "recompute_config.select_comm_recompute": True,
        "swap_config.swap": True,
        "parallel.strategy_ckpt_config": {"save_file": "x"},
        "context.op_timeout": 600,
        "context.jit_config.exec_mode": "sink",
        "monitor_config.health_checkpoint": {},
        "train_dataset.repeat": 2,
        "train_dataset.data_loader.first_sample": 4,
        "processor.tokenizer.type": "x",
        "callbacks.2.integrated_save": True,
        "moe_config.expert_model_parallel": 2,
    }
    values = load_yaml(TINY)
    for key, value in asked.items():
        override(values, key, value, TINY)
    with pytest.raises(ConfigError) as caught:
        Run.of(values, TINY)
    refused = {sentence.removeprefix(f"{TINY}: ").split()[0] for sentence in caught.value.sentences}
    assert refused == {key.replace(".2.", "[2].") for key in asked}


@pytest.mark.parametrize("choice", [Optimizer, Schedule, Wrapper, Callback], ids=lambda choice: choice.__name__)
def test_classes_that_do_not_work_here(choice: type[Choice]) -> None:
    assert not set(choice.refused) & {*choice.kinds, *choice.others.split()}
    for kind, why in choice.refused.items():
        reader = Reader()
        reader.convert(choice, {"type": kind}, "section")
        assert reader.faults == [f"section.type is {kind!r}, but {why}"]


NEEDS = [
    ({"auto_tune": True}, "auto_tune", "filepath_prefix"),
    ({"auto_tune": True, "filepath_prefix": "x", "autotune_per_step": 10}, None, ""),
    ({"use_skip_data_by_global_norm": True, "runner_wrapper.use_clip_grad": False}, "use_skip_data", "use_clip_grad"),
    ({"monitor_config.global_norm_spike_factor": 5.0}, "global_norm_spike_factor", "use_skip_data_by_global_norm"),
    (
        {
            "use_skip_data_by_global_norm": True,
            "context.device_target": "Ascend",
            "runner_config.sink_mode": True,
            "runner_config.sink_size": 4,
        },
        "runner_config.sink_size",
        "every step",
    ),
    ({"data_skip_steps": 3, "ignore_data_skip": True}, "data_skip_steps", "ignore_data_skip"),
    ({"do_eval": True, "eval_dataset": None}, "do_eval", "eval_dataset"),
    ({"optimizer.amsgrad": True}, "optimizer.amsgrad", "use_fused"),
    ({"optimizer.use_fused": True}, "optimizer.use_fused", "Ascend"),
    ({"train_dataset.python_multiprocessing": True}, "train_dataset.python_multiprocessing", "one thread"),
    ({"train_dataset_task.dataset_config": {"data_loader": {}}}, "train_dataset_task.dataset_config", "leave it out"),
    ({"model.model_config.batch_size": 3}, "model.model_config.batch_size", "runner_config.batch_size"),
    ({"model.model_config.checkpoint_name_or_path": "x"}, "checkpoint_name_or_path", "load_checkpoint"),
]


@pytest.mark.parametrize(("asked", "key", "word"), NEEDS, ids=lambda value: str(value)[:40])
def test_keys_that_need_others(asked: dict[str, Any], key: str | None, word: str) -> None:
    values = load_yaml(TINY)
    for name, value in asked.items():
        override(values, name, value, TINY)
    wrong = check_run(Run.of(values, TINY))
    assert [bool(key and key in violation.key and word in violation.sentence) for violation in wrong] == [True] * bool(
        key
    )


def leaves(values: dict[str, Any], name: str = "") -> Iterator[str]:
    """Every key of a YAML, sections of known names entered."""
    for key, value in values.items():
        yield f"{name}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{name}{key}.")


def mindformers_yamls() -> list[Path]:
    """MindFormers' own YAMLs of DeepSeek."""
    folder = Path(importlib.util.find_spec("mindformers").origin).parents[1] / "configs" / "deepseek3"
    return sorted(folder.glob("*.yaml"))


@pytest.mark.parametrize("path", mindformers_yamls(), ids=lambda path: path.stem)
def test_yamls_of_mindformers(path: Path) -> None:
    """Every key works, or has its sentence in the first answer: what its name is here, or why it cannot be set."""
    values = load_yaml(path)
    with pytest.raises(ConfigError) as caught:
        Run.of(values, path)
    sentences = {
        sentence.removeprefix(f"{path}: ").split()[0].rstrip(":"): sentence for sentence in caught.value.sentences
    }
    here = Run.of(load_yaml(TINY), TINY).known_keys()
    assert sentences.pop("model.model_config.type")
    for key in leaves(values):
        name = key.rpartition(".")[2]
        if key.startswith("model.model_config.") and key not in here:
            assert sentences.pop(key).endswith(f"; {ELSEWHERE[name]}")
    for key, sentence in sentences.items():
        assert OTHER_VALUES[key] in sentence


def test_the_names_that_are_told_exist() -> None:
    here = Run.of(load_yaml(TINY), TINY).known_keys()
    for told in ELSEWHERE.values():
        if told.startswith("here it is "):
            name = re.split("[ :,]", told.removeprefix("here it is "))[0]
            assert name in here or f"model.model_config.{name}" in here
