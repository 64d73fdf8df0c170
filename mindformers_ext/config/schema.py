"""What a YAML for run_mindformer.py may hold: the keys of every section and what their values must be.

MindFormers 1.9.0 keeps a template of its sections (mindformers.tools.register.template) but accepts any key in half
of them, so a typo trains quietly. The tables below name every legal key once; config_check.py applies them.
Sections with a `type` (optimizer, callbacks, ...) take their keys from the constructor of the class they name, and
`model_config` and `moe_config` from the model's own configuration class.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mindformers.core.config_args import ContextConfig, MFContextConfig
from mindformers.tools.register import template
from mindspore.parallel import _auto_parallel_context as auto_parallel


@dataclass(frozen=True)
class Rule:
    """A condition on a value; `says` completes the sentence "must be ..."."""

    says: str
    holds: Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for an int or float that is not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(low: int) -> Rule:
    """A whole number of at least `low`."""
    return Rule(f"a whole number of at least {low}", lambda v: is_whole(v) and v >= low)


def number(low: float, high: float = float("inf"), above: bool = False) -> Rule:
    """A number in [low, high], or in (low, high] when `above`."""
    says = f"a number {'above' if above else 'of at least'} {low}" + (f" and at most {high}" if high < 1e30 else "")
    return Rule(says, lambda v: is_number(v) and (low < v if above else low <= v) and v <= high)


def one_of(*values: Any) -> Rule:
    """One of the listed values, of the same type."""
    return Rule(f"one of {', '.join(map(repr, values))}", lambda v: any(v == x and type(v) is type(x) for x in values))


def list_of(rule: Rule, size: int | None = None) -> Rule:
    """A list whose items all satisfy `rule`, of `size` items if given."""
    says = f"a list of {size or ''} items, each {rule.says}".replace("  ", " ")
    return Rule(
        says, lambda v: isinstance(v, list) and (size is None or len(v) == size) and all(rule.holds(x) for x in v)
    )


def either(*rules: Rule) -> Rule:
    """A value that satisfies any of the rules."""
    return Rule(" or ".join(rule.says for rule in rules), lambda v: any(rule.holds(v) for rule in rules))


ANY = Rule("anything", lambda v: True)
BOOL = Rule("True or False", lambda v: isinstance(v, bool))
TEXT = Rule("a text", lambda v: isinstance(v, str))
MAPPING = Rule("a mapping of keys", lambda v: isinstance(v, dict))
EMPTY = Rule("empty", lambda v: v is None)


def keys(words: Any, rule: Rule = ANY) -> dict[str, Rule]:
    """One rule for several keys, given as an iterable or as one text of words.

    Keys with the rule ANY are read by MindFormers only.
    """
    return dict.fromkeys(words.split() if isinstance(words, str) else words, rule)


FRACTION = number(0, 1)
RUN_MODES = ("train", "finetune", "eval", "predict")
TYPED = {"type": TEXT, "auto_register": TEXT}

DATASET = keys(
    "type output_columns eod_reset eod_token_id auto_tune filepath_prefix autotune_per_step profile token_monitor "
    "token_monitor_config dynamic_batch divisor remainder pad_token_id do_eval tokenizer max_length input_sliced_sig "
    "micro_batch_num mixup_op dataset_dir text_transforms image_transforms"
) | {
    "data_loader": MAPPING,
    "input_columns": list_of(TEXT),
    "construct_args_key": list_of(TEXT),
    "batch_size": whole(1),
    "num_parallel_workers": whole(1),
    "python_multiprocessing": BOOL,
    "drop_remainder": BOOL,
    "repeat": whole(1),
    "numa_enable": BOOL,
    "prefetch_size": whole(1),
    "seed": whole(0),
}

MEGATRON_CONFIG = keys("path_to_cache s3_cache_path mmap_bin_files tokenizer") | {
    "random_seed": whole(0),
    "seed": whole(0),
    "seq_length": whole(1),
    "split": either(TEXT, EMPTY),
    "reset_position_ids": BOOL,
    "reset_attention_mask": BOOL,
    "eod_mask_loss": BOOL,
    "create_attention_mask": BOOL,
    "create_compressed_eod_mask": BOOL,
    "compressed_eod_mask_length": whole(1),
    "eod_pad_length": whole(1),
    "num_dataset_builder_threads": whole(1),
    "drop_last_partial_validation_sequence": BOOL,
    "add_extra_token_to_sequence": BOOL,
    "eod": whole(-1),
    "pad": whole(-1),
    "data_path": either(TEXT, list_of(either(TEXT, number(0)))),
    "train_data_path": either(TEXT, list_of(either(TEXT, number(0)))),
    "valid_data_path": either(TEXT, list_of(either(TEXT, number(0)))),
    "test_data_path": either(TEXT, list_of(either(TEXT, number(0)))),
}

TOP = (
    keys(template.GeneralConfig.keys())
    | keys(template.CONFIG_NAME_TO_CLASS)
    | keys(
        "base_config checkpoint tensorboard generation_config grouped_lr_schedule remove_redundancy "
        "use_graceful_exit resume_by_last_timestamp_ckpt calculate_per_token_loss check_for_nan_in_loss_and_grad "
        "profiler_level use_skip_data_by_global_norm use_checkpoint_health_monitor transform_by_rank npu_num_per_node "
        "top_k trust_remote_code use_legacy_format push_to_hub auto_tune filepath_prefix autotune_per_step"
    )
    | {
        "seed": whole(0),
        "output_dir": TEXT,
        "run_mode": one_of(*RUN_MODES),
        "use_parallel": BOOL,
        "load_checkpoint": either(TEXT, EMPTY),
        "load_ckpt_format": one_of("safetensors", "ckpt"),
        "auto_trans_ckpt": BOOL,
        "only_save_strategy": BOOL,
        "resume_training": either(BOOL, TEXT),
        "do_eval": BOOL,
        "ignore_data_skip": BOOL,
        "micro_batch_interleave_num": whole(1),
        "profile": BOOL,
        "callbacks": list_of(MAPPING),
        "eval_callbacks": list_of(MAPPING),
    }
)

SECTIONS: dict[str, dict[str, Rule]] = {
    "": TOP,
    "runner_config": keys(template.RunnerConfig.keys())
    | {
        "epochs": whole(1),
        "batch_size": whole(1),
        "sink_mode": BOOL,
        "sink_size": either(whole(1), one_of(-1)),
        "gradient_accumulation_steps": whole(1),
        "stop_step": whole(0),
    },
    "trainer": TYPED | {"model_name": TEXT},
    "model": keys(["pretrained_model_dir", "generation_config"]) | {"model_config": MAPPING, "arch": MAPPING},
    "model.arch": TYPED,
    "parallel_config": keys(template.ParallelConfig.keys())
    | keys(
        "data_parallel model_parallel context_parallel expert_parallel pipeline_stage micro_batch_num seq_split_num "
        "gradient_aggregation_group",
        whole(1),
    )
    | {"vocab_emb_dp": BOOL, "use_seq_parallel": BOOL},
    "recompute_config": keys(template.RecomputeConfig.keys())
    | {
        "recompute": either(BOOL, list_of(either(BOOL, whole(0)))),
        "select_recompute": either(BOOL, list_of(ANY), MAPPING),
        "parallel_optimizer_comm_recompute": BOOL,
        "mp_comm_recompute": BOOL,
        "recompute_slice_activation": BOOL,
    },
    "swap_config": keys(template.SwapConfig.keys()),
    "monitor_config": keys(template.MonitorConfig.keys()),
    "parallel": keys(auto_parallel._set_auto_parallel_context_func_map)
    | keys(["pipeline_stages", "auto_pipeline"])
    | {
        "parallel_mode": one_of(
            0, 1, 2, 3, "stand_alone", "data_parallel", "semi_auto_parallel", "auto_parallel", "hybrid_parallel"
        ),
        "gradients_mean": BOOL,
        "enable_alltoall": BOOL,
        "full_batch": BOOL,
        "dataset_strategy": either(one_of("full_batch", "data_parallel"), list_of(list_of(whole(1)))),
        "search_mode": one_of("sharding_propagation", "dynamic_programming", "recursive_programming"),
        "enable_parallel_optimizer": BOOL,
        "parallel_optimizer_config": MAPPING,
        "strategy_ckpt_save_file": TEXT,
        "strategy_ckpt_config": MAPPING,
    },
    "parallel.parallel_optimizer_config": {
        "gradient_accumulation_shard": BOOL,
        "parallel_optimizer_threshold": whole(0),
        "optimizer_weight_shard_size": either(whole(1), one_of(-1)),
    },
    "parallel.strategy_ckpt_config": {"load_file": TEXT, "save_file": TEXT, "only_trainable_params": BOOL},
    "context": keys(ContextConfig.get_supported_kwargs())
    | keys(MFContextConfig.get_supported_kwargs())
    | keys("affinity_cpu_list affinity_config inter_op_parallel_num jit_syntax_level memory_offload op_timeout")
    | {
        "mode": one_of(0, 1, "GRAPH_MODE", "PYNATIVE_MODE"),
        "device_target": one_of("CPU", "Ascend"),
        "device_id": whole(0),
        "max_device_memory": Rule("a text like '55GB'", lambda v: isinstance(v, str) and v[-2:] == "GB"),
        "max_call_depth": whole(1),
        "save_graphs": either(BOOL, one_of(0, 1, 2, 3)),
        "jit_config": MAPPING,
        "ascend_config": MAPPING,
        "dataset_broadcast_opt_level": one_of(0, 1, 2, 3),
    },
    "context.jit_config": keys(["exec_mode", "jit_syntax_level", "infer_boost"])
    | {"jit_level": one_of("O0", "O1", "O2")},
    "train_dataset": DATASET,
    "eval_dataset": DATASET,
    "train_dataset.data_loader.config": MEGATRON_CONFIG,
    "eval_dataset.data_loader.config": MEGATRON_CONFIG,
    "train_dataset_task": TYPED | {"dataset_config": MAPPING},
    "eval_dataset_task": TYPED | {"dataset_config": MAPPING},
}

# Sections that name a class: the class's registry, and keys that the Trainer reads beside its constructor's.
CLASS_SECTIONS: dict[str, tuple[str, dict[str, Rule]]] = {
    "optimizer": (
        "optimizer",
        TYPED
        | {
            "learning_rate": number(0, above=True),
            "weight_decay": number(0),
            "betas": list_of(number(0, 1), size=2),
            "eps": number(0, above=True),
        },
    ),
    "lr_schedule": (
        "lr",
        TYPED
        | keys(["scale"])
        | {
            "learning_rate": number(0, above=True),
            "lr_end": number(0),
            "warmup_lr_init": number(0),
            "warmup_steps": whole(0),
            "warmup_epochs": whole(0),
            "warmup_ratio": FRACTION,
            "total_steps": either(whole(1), one_of(-1)),
        },
    ),
    "runner_wrapper": (
        "wrapper",
        TYPED
        | {"use_clip_grad": BOOL, "max_grad_norm": number(0, above=True), "scale_sense": either(number(1), MAPPING)},
    ),
    "runner_wrapper.scale_sense": ("wrapper", TYPED | {"loss_scale_value": number(1)}),
    "callbacks": (
        "callback",
        TYPED
        | {
            "per_print_times": whole(1),
            "save_checkpoint_steps": whole(1),
            "keep_checkpoint_max": whole(1),
            "checkpoint_format": one_of("safetensors"),
            "integrated_save": Rule("False: every rank saves its own part", lambda v: v is False),
            "async_save": BOOL,
        },
    ),
    "eval_callbacks": ("callback", TYPED),
    "train_dataset.data_loader": (
        "dataset_loader",
        TYPED | keys(["dataset_dir", "dataset_files"]) | {"sizes": list_of(whole(0), size=3), "config": MAPPING},
    ),
    "eval_dataset.data_loader": (
        "dataset_loader",
        TYPED | keys(["dataset_dir", "dataset_files"]) | {"sizes": list_of(whole(0), size=3), "config": MAPPING},
    ),
}
