"""One run, read once: a YAML with its overrides as typed sections, the model, and the numbers that follow from them.

Imports neither MindSpore nor MindFormers, so that a YAML is checked in a fraction of a second. Everything that works on
a run takes this object; strings with dots and mappings of the YAML stay in this folder.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from mindformers_ext.config.model import FAMILIES, ModelConfig, MoeConfig
from mindformers_ext.config.pipeline import Pipeline
from mindformers_ext.config.recipe import Recipe
from mindformers_ext.config.sections import (
    CHECKPOINTS,
    Arch,
    Callback,
    Context,
    Dataset,
    DatasetTask,
    GroupedSchedule,
    MonitorConfig,
    Optimizer,
    ParallelConfig,
    ParallelContext,
    Processor,
    RecomputeConfig,
    RunnerConfig,
    Schedule,
    SwapConfig,
    Tensorboard,
    Text,
    Trainer,
    Wrapper,
)
from mindformers_ext.config.typed import NotNegative, Only, Positive, PositiveNumber, Reader, dotted_keys, only, says
from mindformers_ext.config.yaml_files import load_yaml, lookup, override

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
SEMI_AUTO = (1, 2, "semi_auto_parallel", "auto_parallel")
Resume = Annotated[
    bool | Annotated[str, Meta(pattern=r"^step_[0-9]+$")], Meta(description="True, False or a step as step_000100")
]
TWICE = "MindFormers 1.9 adds the interleaved parts' gradients without dividing, which doubles them"
BY_BATCH = "the loss is the mean over each micro-batch's tokens"
GENERATION = "run_mode predict is this project's own: model.model_config says how tokens are chosen"
HUGGINGFACE = "a HuggingFace folder to begin from is given as load_checkpoint"
LEGACY = "the models are built of this project's own layers, for which MindFormers takes its legacy ways"


@dataclass(kw_only=True)
class Model:
    """The `model` section; what model_config may hold depends on its type (model.py)."""

    model_config: dict[str, Any]
    arch: Arch | None = None
    passed_on = {only(None, HUGGINGFACE): "pretrained_model_dir", only(None, GENERATION): "generation_config"}


@dataclass(kw_only=True)
class Sections:
    """The top level of a YAML. Sections that may be missing, but not empty, have the default None all the same."""

    seed: NotNegative = 0
    output_dir: Text = "./output"
    run_mode: Literal["train", "finetune", "eval", "predict", "score", "compile"] = "train"
    use_parallel: bool = False
    load_checkpoint: str | None = ""
    resume_training: Resume = False
    input_data: str | list[str] | None = None
    trainer: Trainer = None
    runner_config: RunnerConfig = field(default_factory=RunnerConfig)
    model: Model
    moe_config: dict[str, Any] = field(default_factory=dict)  # model.py's MoeConfig, over what the family assumes
    optimizer: Optimizer = None
    lr_schedule: Schedule = None
    grouped_lr_schedule: GroupedSchedule | None = None
    runner_wrapper: Wrapper = None
    callbacks: list[Callback] = field(default_factory=list)
    train_dataset: Dataset = None
    train_dataset_task: DatasetTask = None
    eval_dataset: Dataset | None = None
    eval_dataset_task: DatasetTask | None = None
    processor: Processor | None = None
    context: Context = field(default_factory=Context)
    parallel: ParallelContext = field(default_factory=ParallelContext)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    recompute_config: RecomputeConfig = field(default_factory=RecomputeConfig)
    swap_config: SwapConfig | None = None
    monitor_config: MonitorConfig | None = None
    tensorboard: Tensorboard | None = None
    recipe: Recipe | None = None
    use_skip_data_by_global_norm: bool = False  # leave bad steps out; monitor_config says what is bad
    check_for_nan_in_loss_and_grad: bool = False  # end at the first step whose loss or gradient norm is not finite
    do_eval: bool = False  # evaluate eval_dataset while training,
    eval_step_interval: Positive = 100  # every so many steps
    use_graceful_exit: bool = False  # end after the step on SIGTERM, SIGUSR1 or the file OUTPUT_DIR/kill_switch
    max_train_hours: PositiveNumber | None = None  # end after the step when the process is this old
    max_step_minutes: PositiveNumber | None = None  # a rank whose step takes longer is named and ended
    data_skip_steps: NotNegative | None = None  # batches that a training from its start leaves out
    ignore_data_skip: bool = False  # resume the training, and begin the data from its start
    auto_tune: bool = False
    filepath_prefix: Text | None = None
    autotune_per_step: Positive | None = None
    passed_on = {
        bool: "lr_scale profile profile_communication profile_memory profile_pipeline init_start_profile mstx",
        bool | None: "train_precision_sync infer_precision_sync",
        Positive: "lr_scale_factor profile_start_step profile_stop_step",
        NotNegative: "profiler_level",
        list[NotNegative] | None: "profile_rank_ids",
        Annotated[int, Only(1, TWICE)]: "micro_batch_interleave_num",
        Annotated[bool, Only(False, BY_BATCH)]: "calculate_per_token_loss",
        only(-1, "eval_step_interval counts steps"): "eval_epoch_interval",
        only(None, "do_eval finds loss and perplexity, and writes them to eval.jsonl"): "eval_callbacks metric",
        only("safetensors", CHECKPOINTS): "load_ckpt_format",
        only(True, CHECKPOINTS): "use_legacy_format",
        only(False, CHECKPOINTS): "auto_trans_ckpt only_save_strategy load_ckpt_async remove_redundancy "
        "transform_by_rank balanced_load resume_by_last_timestamp_ckpt",
        only(False, "the callback CheckpointMonitor has check_health"): "use_checkpoint_health_monitor",
        only(1, CHECKPOINTS): "transform_process_num reshard_worker_num",
        only("", CHECKPOINTS): "src_strategy_path_or_dir",
        only(None, CHECKPOINTS): "checkpoint npu_num_per_node remote_save_url",
        only("", HUGGINGFACE): "pretrained_model_dir",
        only(True, LEGACY): "use_legacy",
        only(None, GENERATION): "adapter_id generation_config predict_batch_size save_file top_k",
        only(False, GENERATION): "postprocess_use_numpy trust_remote_code",
        only(1, "MindFormers reads it for its own prediction; training has profiler_level"): "profile_level",
        only(True, "the callback TrainingMetrics writes the parts of the loss in every run"): "print_separate_loss",
        only(False, "MindFormers 1.9 refuses it"): "layer_scale",
        only(0.65, "only layer_scale used it, which MindFormers 1.9 refuses"): "layer_decay",
        only(False, "MindFormers 1.9 reads it nowhere"): "exclude_cann_cpu",
        only(False, "nothing is uploaded; convert_reversed.py writes a HuggingFace folder"): "push_to_hub",
    }


def said(dotted_key: str) -> property:
    """What the sections of a run say at `section.key`."""
    return property(attrgetter(f"sections.{dotted_key}"))


class Degrees:
    """What follows from the degrees and the batch of a run, or of a plan of the dry run."""

    @property
    def devices_per_stage(self) -> int:
        """dp * cp * mp; stages are blocks of consecutive ranks."""
        return self.dp * self.cp * self.mp

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_size * self.dp * self.micro_batches

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch * self.model.seq_length


@dataclass
class Run(Degrees):
    """What one YAML asks for.

    Args:
        path: of the YAML, for messages.
        sections: the YAML, typed.
        model: the model with its experts; None when `model_config.type` is another model's class.
        device_num: devices of the cluster.
        values: the YAML as it was read, with its overrides; MindFormers is given a copy.
    """

    path: str
    sections: Sections
    model: ModelConfig | None
    device_num: int
    values: dict[str, Any] = field(repr=False)

    cp = said("parallel_config.context_parallel")
    mp = said("parallel_config.model_parallel")
    pp = said("parallel_config.pipeline_stage")
    ep = said("parallel_config.expert_parallel")
    batch_size = said("runner_config.batch_size")  # sequences of a data-parallel rank and micro-batch
    scheduler = said("parallel.pipeline_config.pipeline_scheduler")  # the order of micro-batches in the pipeline
    sequence_parallel = said("parallel_config.use_seq_parallel")  # tokens lie on mp between its operators
    recompute = said("recompute_config.recompute")  # layers that are computed again in the backward
    select_recompute = said("recompute_config.select_recompute")  # layers of which only some operators are
    # Weights and optimizer states are split over their copies; over how many (-1: all); gradient buffers are too.
    shard_optimizer = said("parallel.enable_parallel_optimizer")
    optimizer_shard_size = said("parallel.parallel_optimizer_config.optimizer_weight_shard_size")
    shard_gradients = said("parallel.parallel_optimizer_config.gradient_accumulation_shard")

    @property
    def dp(self) -> int:
        """The data-parallel degree; where every device holds the whole model, all devices, which no YAML must count."""
        return self.device_num if self.holds_whole_models else self.sections.parallel_config.data_parallel

    @property
    def holds_whole_models(self) -> bool:
        """True in MindFormers' data-parallel mode."""
        return self.sections.use_parallel and self.sections.parallel.parallel_mode in (0, "data_parallel")

    @classmethod
    def of(cls, values: dict[str, Any], path: str | Path, device_num: int | None = None) -> "Run":
        """The run of a YAML that is in memory; `device_num` None means the product of the degrees.

        Raises:
            ConfigError: every unknown key, and every value of the wrong kind.
        """
        reader = Reader(str(path))
        sections = reader.build(Sections, values, "")
        given = lookup(values, "model.model_config")
        model = read_model(reader, given, values.get("moe_config")) if isinstance(given, dict) else None
        reader.raise_faults()
        degrees = sections.parallel_config
        product = degrees.data_parallel * degrees.context_parallel * degrees.model_parallel * degrees.pipeline_stage
        return cls(str(path), sections, model, product if device_num is None else device_num, values)

    def changed(self, overrides: Iterable[tuple[str, Any]], device_num: int | None = None) -> "Run":
        """This run with other values of `section.key`s. Raises ConfigError as `of` does."""
        values = copy.deepcopy(self.values)
        for key, value in overrides:
            override(values, key, value, self.path)
        return Run.of(values, self.path, device_num)

    def value(self, dotted_key: str) -> Any:
        """What the YAML says at `section.key`, None where it says nothing."""
        return lookup(self.values, dotted_key)

    def known_keys(self) -> set[str]:
        """Every `section.key` that the YAML may hold."""
        parts = {"model.model_config": type(self.model), "moe_config": MoeConfig} if self.model else {}
        found = set(dotted_keys(Sections))
        for section, cls in parts.items():
            found |= {f"{section}.{key}" for key in dotted_keys(cls)}
        return found

    @property
    def is_semi_auto(self) -> bool:
        """True when MindSpore splits one graph over the devices."""
        return self.sections.use_parallel and self.sections.parallel.parallel_mode in SEMI_AUTO

    @property
    def on_cpu(self) -> bool:
        """True when the run itself is on CPU."""
        return self.sections.context.device_target == "CPU"

    @property
    def is_pynative(self) -> bool:
        """True when operators run one by one, without a graph."""
        return self.value("context.mode") in (1, "PYNATIVE_MODE")

    @property
    def trains(self) -> bool:
        """True for run modes that change weights, or compile what would."""
        return self.sections.run_mode in ("train", "finetune", "compile")

    @property
    def only_compiles(self) -> bool:
        """True when the run ends where training would begin."""
        return self.sections.run_mode == "compile"

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step: MindFormers reads another key without a pipeline."""
        if self.pp > 1:
            return self.sections.parallel_config.micro_batch_num
        return self.sections.runner_config.gradient_accumulation_steps

    @property
    def vocab_emb_dp(self) -> bool:
        """Every rank holds the whole embedding; MindFormers resets it with a pipeline."""
        return self.sections.parallel_config.vocab_emb_dp and self.pp == 1

    @property
    def optimizer_threshold_bytes(self) -> int:
        """Smaller parameters are not split."""
        return self.sections.parallel.parallel_optimizer_config.parallel_optimizer_threshold * 1024

    @property
    def chunks(self) -> int:
        """Runs of layers in each stage."""
        return self.model.pp_interleave_num

    @cached_property
    def pipeline(self) -> Pipeline:
        """Where every decoder layer lies."""
        return self.model.pipeline(self.pp, self.scheduler)

    def layers_of(self, stage: int) -> list[int]:
        """Decoder layers of `stage`; layer num_layers and above are MTP's."""
        return self.pipeline.layers_of(stage)


def read_run(path: str | Path, device_num: int | None = None, overrides: Iterable[tuple[str, Any]] = ()) -> Run:
    """Read a YAML with `--section.key value` overrides.

    Raises:
        ConfigError: unreadable YAML, unknown keys, or values of the wrong kind.
    """
    values = load_yaml(path)
    for key, value in overrides:
        override(values, key, value, path)
    return Run.of(values, path, device_num)


def read_model(reader: Reader, given: dict[str, Any], moe: Any) -> ModelConfig | None:
    """The model of `model_config` and `moe_config`; None for a class of another model, and when something is wrong."""
    kind, reference = given.get("type"), given.get("auto_register")
    if not isinstance(kind, str):
        reader.refuse("model.model_config.type", kind, says(Literal[tuple(FAMILIES)]))
        kind = "DeepseekV3Config"  # for the sentences on its other keys
    elif not isinstance(reference, str) or reference.rpartition(".")[2] != kind:
        must_be = f"a module and the class of its type {kind!r}, for example deepseek3_config.DeepseekV3Config"
        reader.refuse("model.model_config.auto_register", reference, must_be)
    if kind not in FAMILIES:
        return None
    cls = FAMILIES[kind]
    experts = reader.build(MoeConfig, {**cls.assumed_moe, **moe} if isinstance(moe, dict) else {}, "moe_config")
    values = {key: value for key, value in given.items() if key not in ("type", "auto_register")}
    return reader.build(cls, values, "model.model_config", moe_config=experts or MoeConfig())
