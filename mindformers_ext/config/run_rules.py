"""What the sections of a run must agree on, whatever it is split over; checked in a moment, before anything is built.

Each rule yields a Violation whose sentence completes "KEY is VALUE, but …".
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from mindformers_ext.config.run import Run
from mindformers_ext.config.sections import (
    AdamW,
    AdapterMonitor,
    CheckpointMonitor,
    Dataset,
    TopkBiasBalance,
    TrainingMetrics,
)
from mindformers_ext.errors import ConfigError
from mindformers_ext.files.json_files import short

REPORTS_SCHEDULE = "WarmupStableCosineStepsLR"  # which has its own count of steps


@dataclass(frozen=True)
class Violation:
    """A rule that a run breaks; `key` is the YAML key to change."""

    key: str
    sentence: str


def refuse(run: Run, violations: Iterable[Violation]) -> None:
    """Raise ConfigError with a sentence for each of `violations`, if there is one."""
    sentences = [f"{run.path}: {v.key} is {short(run.value(v.key))}, but {v.sentence}" for v in violations]
    if sentences:
        raise ConfigError(*sentences)


DOCUMENTS = 1024  # that FlashAttentionScore takes in layout TND, says MindSpore 2.9


def what_training_needs(run: Run) -> Iterator[Violation]:
    s = run.sections
    if not run.trains:
        return
    for key in ("trainer", "optimizer", "train_dataset", "train_dataset_task", "runner_wrapper"):
        if getattr(s, key) is None:
            yield Violation(key, f"run_mode {s.run_mode!r} needs this section")
    if s.lr_schedule is None and getattr(s.optimizer, "learning_rate", 1) is None:
        yield Violation("lr_schedule", "training needs this section, or optimizer.learning_rate")
    if s.train_dataset is not None and s.train_dataset.data_loader is None:
        yield Violation("train_dataset.data_loader", "training needs this section")
    if s.model.arch is None:
        yield Violation("model.arch", "training needs this section")


def what_compiling_needs(run: Run) -> Iterator[Violation]:
    if run.only_compiles and not run.is_semi_auto:
        yield Violation("run_mode", "only a graph that is split over ranks is compiled before it runs; leave it out")


def what_inference_needs(run: Run) -> Iterator[Violation]:
    s = run.sections
    if run.trains:
        return
    if s.use_parallel:
        yield Violation("use_parallel", f"run_mode {s.run_mode!r} runs on one device")
    if s.run_mode == "eval" and (not s.eval_dataset or not s.eval_dataset.data_loader or not s.eval_dataset_task):
        yield Violation("eval_dataset", "run_mode eval needs the sections eval_dataset and eval_dataset_task")


def dataset_in_use(run: Run) -> tuple[str, Dataset | None]:
    """Name and section of the Megatron data that the run reads: training is not refused for its eval section."""
    name = "eval_dataset" if run.sections.run_mode == "eval" else "train_dataset"
    dataset = getattr(run.sections, name)
    reads = run.sections.run_mode not in ("predict", "score") and dataset is not None and dataset.megatron is not None
    return name, dataset if reads else None


def data_of_a_run(run: Run) -> Iterator[Violation]:
    name, dataset = dataset_in_use(run)
    if dataset is None:
        return
    section, length = f"{name}.data_loader.config", run.value("model.model_config.seq_length")
    if length is not None and dataset.megatron.config.seq_length != length:
        yield Violation(f"{section}.seq_length", f"must equal model.model_config.seq_length {length}")
    given, same = run.value(f"{section}.seed"), run.value(f"{section}.random_seed")
    if None not in (given, same) and given != same:
        yield Violation(f"{section}.seed", f"random_seed means the same and is {same}; leave one of them out")
    if not dataset.megatron.config.paths and not dataset.megatron.config.conversations:
        yield Violation(f"{section}.data_path", "must name the data: the prefix of a .bin/.idx pair")
    ends = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss", "create_compressed_eod_mask")
    asked = [key for key in ends if run.value(f"{section}.{key}")]
    if asked and run.value(f"{section}.eod") in (None, -1):
        yield Violation(f"{section}.eod", f"{asked[0]} needs the id of the token that ends a document")
    if run.model is not None and run.model.input_sliced_sig and "labels" not in (dataset.input_columns or ()):
        yield Violation(
            f"{name}.input_columns", "with model_config.input_sliced_sig True the columns must hold 'labels'"
        )


def documents_by_their_ends(run: Run) -> Iterator[Violation]:
    """create_compressed_eod_mask: what its column actual_seq_len needs on its way to attention."""
    name, dataset = dataset_in_use(run)
    section = f"{name}.data_loader.config"
    if dataset is None or not run.value(f"{section}.create_compressed_eod_mask"):
        return
    why = "with create_compressed_eod_mask"
    if (dataset.input_columns or ("",))[-1] != "actual_seq_len":
        yield Violation(f"{name}.input_columns", f"{why} the last column must be 'actual_seq_len'")
    if "actual_seq_len" not in (run.value(f"{name}.construct_args_key") or dataset.input_columns or ()):
        yield Violation(f"{name}.construct_args_key", f"{why} the model must be given 'actual_seq_len'")
    if run.value(f"{section}.create_attention_mask"):
        yield Violation(f"{section}.create_attention_mask", f"{why} it must be False: the ends of documents replace it")
    if run.model is not None and run.sections.use_parallel and not run.model.use_flash_attention:
        yield Violation("model.model_config.use_flash_attention", f"{why} and use_parallel it must be True")
    keys = (f"{section}.eod_pad_length", f"{section}.compressed_eod_mask_length")
    length = next((value for value in map(run.value, keys) if value is not None), 128)
    samples = run.value("runner_config.batch_size") or 1
    if run.value("context.device_target") == "Ascend" and samples * (length + 1) > DOCUMENTS:
        yield Violation(
            keys[0], f"runner_config.batch_size {samples} times one more than it must not pass {DOCUMENTS} documents"
        )


def the_models_own_network(run: Run) -> Iterator[Violation]:
    arch = run.sections.model.arch
    if run.model is None or arch is None:
        return
    network = run.value("model.model_config.type").replace("Config", "ForCausalLM")
    if arch.type != network:
        yield Violation("model.arch.type", f"the network of its model_config is {network!r}")
    elif (arch.auto_register or "").rpartition(".")[2] != network:
        yield Violation("model.arch.auto_register", f"it must name a module and the class {network!r}")


def balancing_needs_its_callback(run: Run) -> Iterator[Violation]:
    model, callbacks = run.model, run.sections.callbacks
    if not run.trains or model is None or not model.moe_config.balance_via_topk_bias:
        return
    if not any(isinstance(item, TopkBiasBalance) and item.balance_via_topk_bias for item in callbacks):
        yield Violation(
            "moe_config.balance_via_topk_bias",
            "the bias moves only with the callback TopkBiasBalanceCallback; add `- type: TopkBiasBalanceCallback` "
            "to callbacks",
        )


def adapters_need_a_rank(run: Run) -> Iterator[Violation]:
    adapters = any(isinstance(item, AdapterMonitor) for item in run.sections.callbacks)
    if adapters and run.model is not None and not run.model.lora.lora_rank:
        yield Violation("callbacks", "AdapterMonitor saves adapters, and model_config.pet_config asks for none")


def one_saver(run: Run) -> Iterator[Violation]:
    savers = [item for item in run.sections.callbacks if isinstance(item, CheckpointMonitor)]
    if len(savers) > 1 and len({item.directory for item in savers}) < len(savers):
        yield Violation("callbacks", f"{len(savers)} callbacks save checkpoints into one folder; give them a directory")


def schedule_that_falls(run: Run) -> Iterator[Violation]:
    rate = run.sections.lr_schedule
    peak, end = getattr(rate, "learning_rate", None), getattr(rate, "lr_end", None)
    if run.value("lr_schedule.type") == REPORTS_SCHEDULE and peak is not None and end > peak:
        yield Violation("lr_schedule.lr_end", f"must lie between 0 and learning_rate {peak}")


def said_elsewhere(run: Run) -> Iterator[Violation]:
    """Keys of model_config that MindFormers fills in, and nothing reads."""
    size = run.value("model.model_config.batch_size")
    if size is not None and size != run.batch_size:
        yield Violation("model.model_config.batch_size", "runner_config.batch_size is read; leave it out")
    if run.value("model.model_config.checkpoint_name_or_path"):
        yield Violation("model.model_config.checkpoint_name_or_path", "load_checkpoint is read; leave it out")


def data_of_a_task(run: Run) -> Iterator[Violation]:
    """MindFormers' way to write it: `train_dataset: &train_dataset` and `dataset_config: *train_dataset`."""
    for name in ("train_dataset", "eval_dataset"):
        given = run.value(f"{name}_task.dataset_config")
        if given is not None and given != run.value(name):
            yield Violation(f"{name}_task.dataset_config", f"{name} is read; leave it out")


def one_reader(run: Run) -> Iterator[Violation]:
    name, dataset = dataset_in_use(run)
    if dataset is not None and run.value(f"{name}.python_multiprocessing"):
        yield Violation(f"{name}.python_multiprocessing", "one thread reads this data as fast as a step needs it")


def keys_that_need_others(run: Run) -> Iterator[Violation]:
    s = run.sections
    if s.auto_tune and (s.filepath_prefix is None or s.autotune_per_step is None):
        yield Violation("auto_tune", "it needs filepath_prefix, a folder for what it finds, and autotune_per_step")
    if s.use_skip_data_by_global_norm and run.trains and not run.value("runner_wrapper.use_clip_grad"):
        yield Violation("use_skip_data_by_global_norm", "the norm is known with runner_wrapper.use_clip_grad only")
    sinks = not run.on_cpu and run.value("runner_config.sink_mode")
    if s.use_skip_data_by_global_norm and sinks and run.value("runner_config.sink_size") not in (None, 1):
        yield Violation("runner_config.sink_size", "use_skip_data_by_global_norm looks at every step; set it to 1")
    if s.do_eval and run.trains:
        if s.eval_dataset is None or s.eval_dataset.megatron is None:
            yield Violation("do_eval", "it needs the section eval_dataset with Megatron files")
        if not any(isinstance(item, CheckpointMonitor) for item in s.callbacks):
            yield Violation("do_eval", "it evaluates checkpoints; add `- type: CheckpointMonitor` to callbacks")
    for key in ("global_norm_spike_threshold", "global_norm_spike_factor"):
        if not s.use_skip_data_by_global_norm and run.value(f"monitor_config.{key}") is not None:
            yield Violation(f"monitor_config.{key}", "only use_skip_data_by_global_norm reads it; set it to True")
    if s.data_skip_steps and s.ignore_data_skip:
        yield Violation("data_skip_steps", "ignore_data_skip begins the data from its start; set it to False")
    for key in ("amsgrad", "maximize"):
        if isinstance(s.optimizer, AdamW) and getattr(s.optimizer, key) and not s.optimizer.use_fused:
            yield Violation(f"optimizer.{key}", "MindFormers' AdamW has it with use_fused only")


def logits_that_are_tracked(run: Run) -> Iterator[Violation]:
    tracked = run.model is not None and run.model.track_max_attention_logit
    monitors = [item.monitors for item in run.sections.callbacks if isinstance(item, TrainingMetrics)]
    key, rule = "model.model_config.track_max_attention_logit", "it must be True: {} reads them"
    if not run.trains or tracked:
        return
    if any(found is not None and found.attention_logits for found in monitors):
        yield Violation(key, rule.format("TrainingMetrics' monitor attention_logits"))
    if getattr(run.sections.optimizer, "qk_clip_threshold", None) is not None:
        yield Violation(key, rule.format("optimizer.qk_clip_threshold"))


def recipe_that_can_be_followed(run: Run) -> Iterator[Violation]:
    recipe = run.sections.recipe
    if recipe is None or not run.trains:
        return
    if run.model is None:
        yield Violation("recipe", "it is followed with DeepSeek's models only")
        return
    sinks = not run.on_cpu and run.value("runner_config.sink_mode")
    if sinks and run.value("runner_config.sink_size") not in (None, 1):
        yield Violation("runner_config.sink_size", "recipe looks at every step; set it to 1")
    for key in ("micro_batches", "mtp_loss_factor", "topk_bias_update_rate"):
        points = getattr(recipe, key) or []
        if any(after[0] <= before[0] for before, after in pairwise(points)):
            yield Violation(f"recipe.{key}", "the tokens of its pairs must rise")
    if recipe.mtp_loss_factor and not run.model.mtp_depth:
        yield Violation("recipe.mtp_loss_factor", "model.model_config.mtp_depth is 0")
    if recipe.topk_bias_update_rate and not run.model.moe_config.balance_via_topk_bias:
        yield Violation("recipe.topk_bias_update_rate", "moe_config.balance_via_topk_bias is False")
    points = recipe.micro_batches
    if not points:
        return
    if points[0][0] != 0 or any(count != int(count) or count < 1 for _, count in points):
        yield Violation("recipe.micro_batches", "it must begin at 0 tokens, and micro-batches are whole numbers")
    elif run.pp > 1 and any(count < run.pp for _, count in points):
        yield Violation("recipe.micro_batches", f"a pipeline of {run.pp} stages needs as many micro-batches")
    if run.holds_whole_models and run.value("parallel_config.data_parallel") is None:
        yield Violation("parallel_config.data_parallel", "recipe.micro_batches counts by it; set it to the devices")
    if not any(isinstance(item, CheckpointMonitor) for item in run.sections.callbacks):
        yield Violation("recipe.micro_batches", "a batch goes on from a checkpoint; add the callback CheckpointMonitor")
    if run.value("lr_schedule.total_steps") in (None, -1) and run.value("lr_schedule.type") != REPORTS_SCHEDULE:
        yield Violation("lr_schedule.total_steps", "with a batch that grows it cannot be counted; set it")


def numbers_of_a_cpu(run: Run) -> Iterator[Violation]:
    """MindSpore multiplies float32 only on CPU, our kernels also bfloat16."""
    model = run.model
    if not run.on_cpu or model is None:
        return
    for key in ("softmax_compute_type", "layernorm_compute_type", "router_dense_type"):
        if getattr(model, key) != "float32":
            yield Violation(f"model.model_config.{key}", "on CPU it must be 'float32'")
    moe = model.moe_config
    in_kernels = moe.expert_num == 1 or (moe.use_gmm and moe.use_fused_ops_permute)
    if model.compute_dtype != "float32" and not (model.compute_dtype == "bfloat16" and in_kernels):
        yield Violation(
            "model.model_config.compute_dtype",
            "on CPU it must be 'float32', or 'bfloat16' with moe_config.use_gmm and moe_config.use_fused_ops_permute "
            "True",
        )


def watched_on_a_card(run: Run) -> Iterator[Violation]:
    monitor = run.sections.monitor_config
    if run.on_cpu and monitor is not None and monitor.monitor_on:
        yield Violation("monitor_config.monitor_on", "MindFormers' monitor needs operators that only Ascend has")


def operators_of_a_card(run: Run) -> Iterator[Violation]:
    if run.on_cpu and getattr(run.sections.optimizer, "use_fused", False):
        yield Violation("optimizer.use_fused", "the fused operator is Ascend's; on CPU the update is one operator too")


RUN_RULES = (
    what_training_needs,
    what_compiling_needs,
    what_inference_needs,
    data_of_a_run,
    documents_by_their_ends,
    the_models_own_network,
    balancing_needs_its_callback,
    adapters_need_a_rank,
    one_saver,
    schedule_that_falls,
    said_elsewhere,
    data_of_a_task,
    one_reader,
    keys_that_need_others,
    recipe_that_can_be_followed,
    logits_that_are_tracked,
)
CPU_RULES = (numbers_of_a_cpu, watched_on_a_card, operators_of_a_card)
