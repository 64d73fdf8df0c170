"""The sections of a YAML beside the model's: one dataclass each.

Keys are MindFormers' (1.9.0, mindformers.tools.register.template, and MindSpore's contexts). A field is a key that this
project reads; `passed_on` are keys that only MindFormers reads, by their type. `Only` marks keys whose other values do
not work with this model.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from mindformers_ext.config.typed import (
    Choice,
    Fraction,
    NotNegative,
    NotNegativeNumber,
    Only,
    Positive,
    PositiveNumber,
    only,
    require,
)

MEGATRON = "BlendedMegatronDatasetDataLoader"
Text = Annotated[str, Meta(min_length=1)]
AllOr = Annotated[int, Meta(ge=-1, description="a whole number of at least 1, or -1 for all")]
Layers = Annotated[
    bool | Annotated[list[int | list[int]], Meta(min_length=1)],
    Meta(description="True, False, or a list with a number of layers per pipeline stage, or one such list per chunk"),
]
Shares = Annotated[
    Text | Annotated[list[Text | int | float], Meta(min_length=1)],
    Meta(description="a text, or a list of texts and weights of at least 0"),
]
Split = Annotated[
    str, Meta(pattern=r"^\s*[0-9.]+\s*(,\s*[0-9.]+\s*)*$", description="shares of the data as '95, 5, 0'")
]
Strategy = Annotated[
    Literal["full_batch", "data_parallel"]
    | Annotated[list[Annotated[list[Positive], Meta(min_length=1)]], Meta(min_length=1)],
    Meta(description="a name, or a list of a list of whole numbers per input"),
]
Formats = Literal["log", "tensorboard"] | list[Literal["log", "tensorboard"]] | None
Betas = Annotated[list[Fraction], Meta(min_length=2, max_length=2)]
Sizes = Annotated[list[NotNegative], Meta(min_length=3, max_length=3)]
Columns = Annotated[list[str], Meta(min_length=1)]
Flags = Annotated[str, Meta(pattern=r"^\s*--\w", description="flags as '--enable_pass=NAME,NAME'")]
GigaBytes = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?GB$", description="a text like '55GB'")]
SEARCH = "only a search for strategies reads it, which these models are not split by"
NO_EVALUATION = "do_eval evaluates while training, and its callback keeps the best checkpoint"
CHECKPOINTS = (
    "checkpoints are this project's own: load_checkpoint reads one into any layout, the callback CheckpointMonitor "
    "says how they are saved"
)
NOT_HANDED_ON = "MindFormers 1.9 does not hand it to MindSpore"
NO_SWAP = "the layers of these models keep or recompute activations, and move none to the host"
STRATEGIES = "sharding.py says how the model is split, and checkpoints need no file of it"
FROM_TOP = "the key of this name at the top of the YAML is read"
LOCAL_NORMS = "the callback TrainingMetrics has monitors.gradient_norms, by parameter and layer on any device"
OTHER_LAYERS = "MindFormers' own layers record it, which these models do not have"


@dataclass(kw_only=True)
class RunnerConfig:
    """How long and in which pieces a run goes over its data."""

    batch_size: Positive = 1  # sequences of a data-parallel rank and micro-batch
    gradient_accumulation_steps: Positive = 1  # micro-batches of a step, without a pipeline
    passed_on = {
        Positive: "epochs",
        bool: "sink_mode",
        AllOr: "sink_size",
        only(0, "MindFormers 1.9 reads it and does not stop; the callback TrainCallBack has stop_step"): ("stop_step"),
        only(1, "only data of images has classes"): "num_classes",
    }


@dataclass(kw_only=True)
class Trainer:
    """The trainer's class and the model's name."""

    type: Literal["CausalLanguageModelingTrainer"]
    passed_on = {Text: "model_name"}


@dataclass(kw_only=True)
class Arch:
    """The model's class."""

    type: Text
    auto_register: Text | None = None


@dataclass(kw_only=True)
class ParallelConfig:
    """The degrees of parallelism."""

    data_parallel: Positive = 1
    model_parallel: Positive = 1
    context_parallel: Positive = 1
    expert_parallel: Positive = 1
    pipeline_stage: Positive = 1
    micro_batch_num: Positive = 1  # micro-batches of a step, with a pipeline
    use_seq_parallel: bool = False
    vocab_emb_dp: bool = True
    passed_on = {
        Positive: "gradient_aggregation_group",
        only(0.1, SEARCH): "mem_coeff",
        Annotated[int, Only(1, "the sequence is split as sharding.py says")]: "seq_split_num ulysses_degree_in_cp",
        Annotated[str, Only("colossalai_cp", "sharding.py gathers keys and values")]: "context_parallel_algo",
        only(None, "parallel.enable_parallel_optimizer took its place"): "optimizer_shard",
    }


@dataclass(kw_only=True)
class RecomputeConfig:
    """What is computed again in the backward instead of kept."""

    recompute: Layers = False
    select_recompute: Layers = False
    passed_on = {
        bool: "parallel_optimizer_comm_recompute mp_comm_recompute recompute_slice_activation",
        only(False, "sharding.py says which operators select_recompute runs again"): "select_comm_recompute "
        "select_recompute_exclude select_comm_recompute_exclude",
    }


@dataclass(kw_only=True)
class SwapConfig:
    """Activations kept on the host: of MindFormers' own layers only."""

    passed_on = {
        only(False, NO_SWAP): "swap",
        only(None, NO_SWAP): "layer_swap op_swap",
        only(1, NO_SWAP): "default_prefetch",
    }


@dataclass(kw_only=True)
class OptimizerShards:
    """parallel_optimizer_config: how weights and optimizer states are split over their copies."""

    gradient_accumulation_shard: bool = False
    parallel_optimizer_threshold: NotNegative = 64  # KiB; smaller parameters are not split
    optimizer_weight_shard_size: Annotated[
        int, Meta(ge=-1, description="a whole number of at least 1, or -1 for all copies of a weight")
    ] = -1


@dataclass(kw_only=True)
class PipelineConfig:
    """pipeline_config of the parallel section."""

    pipeline_interleave: bool = False
    pipeline_scheduler: Literal["1f1b", "gpipe", "seqpipe", "seqvpp", "seqsmartvpp", "zero_bubble_v"] = "1f1b"


@dataclass(kw_only=True)
class ParallelContext:
    """The `parallel` section: MindSpore's auto_parallel_context."""

    parallel_mode: Literal[
        0, 1, 2, 3, "stand_alone", "data_parallel", "semi_auto_parallel", "auto_parallel", "hybrid_parallel"
    ] = 1
    full_batch: bool = False
    dataset_strategy: Strategy | None = None
    enable_parallel_optimizer: bool = False
    parallel_optimizer_config: OptimizerShards = field(default_factory=OptimizerShards)
    pipeline_config: PipelineConfig = field(default_factory=PipelineConfig)
    passed_on = {
        bool: "gradients_mean gradient_fp32_sync enable_alltoall force_fp32_communication parameter_broadcast",
        list[Positive]: "all_reduce_fusion_config",
        only("sharding_propagation", SEARCH): "search_mode auto_parallel_search_mode",
        only(False, SEARCH): "sharding_propagation auto_pipeline",
        only(None, STRATEGIES): "strategy_ckpt_config strategy_ckpt_save_file strategy_ckpt_load_file "
        "group_ckpt_save_file",
        only(False, STRATEGIES): "optimizer_weight_shard_aggregated_save",
        only(True, "the gradients would be those of every copy of the loss together"): "loss_repeated_mean",
        only(False, "only prediction over a pipeline has a result to send"): "pipeline_result_broadcast",
        only(None, "the launcher's processes say it"): "device_num global_rank",
        only(None, "parallel_config.pipeline_stage says it"): "pipeline_stages pipeline_segments",
        only(1, "MindSpore refuses it; see runner_config.gradient_accumulation_steps"): "grad_accumulation_step",
        only(None, "it is a key of parallel_optimizer_config"): "optimizer_weight_shard_size",
        only(None, LOCAL_NORMS): "dump_local_norm dump_device_local_norm dump_local_norm_path",
        only(None, "MindSpore sets it for itself"): "init_param_in_compile auto_parallel_new_interface",
        dict[str, Any]: "comm_fusion",
        Literal["all_group_parallel", "same_server_group_parallel", "no_group_parallel"]: "communi_parallel_mode",
    }


@dataclass(kw_only=True)
class JitConfig:
    """jit_config of the context."""

    passed_on = {
        Literal["O0", "O1", "O2"]: "jit_level",
        Literal["on", "off"]: "infer_boost",
        only(None, "MindSpore 2.9 refuses it here"): "exec_mode jit_syntax_level",
    }


@dataclass(kw_only=True)
class AscendConfig:
    """ascend_config of the context."""

    parallel_speed_up_json_path: Text | None = None
    passed_on = {
        Text: "precision_mode op_precision_mode op_debug_option",
        Literal[0, 1]: "atomic_clean_policy",
        bool: "jit_compile matmul_allow_hf32 conv_allow_hf32 hccl_watchdog",
        dict[str, Any]: "ge_options topo_order",
        only(None, "MindSpore 2.9 no longer reads it"): "exception_dump",
        Positive: "host_scheduling_max_threshold",
    }


@dataclass(kw_only=True)
class Context:
    """The `context` section: MindSpore's device and compiler. Only some keys mean something on CPU (run_modes)."""

    device_target: Literal["CPU", "Ascend"] = "Ascend"
    max_device_memory: GigaBytes | None = None
    jit_config: JitConfig | None = None
    ascend_config: AscendConfig | None = None
    graph_kernel_flags: Flags | None = None  # MindSpore's MS_DEV_GRAPH_KERNEL_FLAGS
    own = ("graph_kernel_flags",)  # that MindFormers does not hand on
    passed_on = {
        Literal[0, 1, "GRAPH_MODE", "PYNATIVE_MODE"]: "mode",
        GigaBytes: "mempool_block_size",
        Literal["O0", "O1"]: "memory_optimize_level",
        Positive: "max_call_depth",
        NotNegative: "device_id",
        bool | Literal[0, 1]: "save_graphs",  # MindFormers makes every other number 1
        Literal[0, 1, 2, 3]: "dataset_broadcast_opt_level",
        Text: "save_graphs_path",
        dict[str, Any]: "affinity_cpu_list affinity_config",
        only("OFF", f"{NOT_HANDED_ON}; train_precision_sync and infer_precision_sync do this"): "deterministic",
        only(None, NOT_HANDED_ON): "variable_memory_max_size memory_offload inter_op_parallel_num runtime_num_threads "
        "op_timeout jit_syntax_level save_compile_cache load_compile_cache precompile_only enable_auto_mixed_precision "
        "enable_sparse enable_reduce_precision enable_profiling check_bprop grad_for_scalar pynative_synchronize "
        "reserve_class_name_in_scope profiling_options print_file_path env_config_path auto_tune_mode",
    }


@dataclass(kw_only=True)
class MonitorConfig:
    """MindFormers' TrainingStateMonitor; and with use_skip_data_by_global_norm, which steps are left out."""

    monitor_on: bool = False
    global_norm_spike_threshold: PositiveNumber | None = None  # the norm of a step that counts is below it,
    global_norm_spike_factor: Annotated[float, Meta(gt=1)] | None = None  # and below this times the running median
    global_norm_spike_window: Positive = 64  # of so many steps, from when there are as many
    global_norm_spike_count_threshold: Positive = 10  # steps in a row that may be left out
    own = ("global_norm_spike_factor", "global_norm_spike_window")  # that MindFormers does not know
    passed_on = {
        str: "dump_path",
        list[str] | None: "target",
        bool: "invert print_struct",
        Positive: "step_interval",
        Formats: "optimizer_state_format weight_state_format",
        only(None, LOCAL_NORMS): "local_norm_format device_local_norm_format",
        PositiveNumber | None: "throughput_baseline",
        dict[str, Any] | None: "stable_rank_config",
        only(None, OTHER_LAYERS): "local_loss_format device_local_loss_format",
        only(None, "the callback TrainingMetrics has monitors.attention_logits"): "max_attention_logit_format",
        only(False, "it trains on from MindFormers' checkpoints, which are not written"): "check_for_global_norm",
        only(None, "it chooses among MindFormers' checkpoints, which are not written"): "health_checkpoint",
    }


@dataclass(kw_only=True)
class MegatronConfig:
    """data_loader.config of Megatron .bin/.idx files: bin_dataset/gpt_dataset.py says what each key does."""

    seq_length: Positive
    data_path: Shares | None = None
    train_data_path: Shares | None = None
    valid_data_path: Shares | None = None
    test_data_path: Shares | None = None
    conversations: dict[str, Any] | None = None  # bin_dataset/conversation_job.py makes the samples of them
    passed_on = {
        Annotated[int, Meta(ge=0, lt=2**32)]: "random_seed seed",
        Split | None: "split",
        Annotated[int, Meta(ge=-1)]: "eod pad",
        bool: "reset_position_ids reset_attention_mask eod_mask_loss create_attention_mask create_compressed_eod_mask "
        "drop_last_partial_validation_sequence add_extra_token_to_sequence",
        Positive: "num_dataset_builder_threads eod_pad_length compressed_eod_mask_length",
        NotNegativeNumber: "mid_level_dataset_surplus",
        Text | None: "path_to_cache s3_cache_path",
        Annotated[bool, Only(True, "files are always mapped")]: "mmap_bin_files",
    }

    @property
    def paths(self) -> dict[str, Any]:
        """The data that is given, by key."""
        names = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
        return {name: value for name in names if (value := getattr(self, name))}


@dataclass(kw_only=True)
class MegatronLoader:
    """data_loader of type BlendedMegatronDatasetDataLoader."""

    type: str
    sizes: Sizes
    config: MegatronConfig
    passed_on = {
        Literal["GPTDataset"]: "datasets_type",
        Annotated[bool, Only(False, "samples come shuffled by config.random_seed")]: "shuffle",
        Literal["train", "valid", "eval", "dev", "test"]: "phase",
        only(None, "MindFormers fills it in with the input_columns of the dataset"): "column_names",
        only(0, "training sets it when it goes on with another batch size"): "first_sample",
        Annotated[
            list[Annotated[list[NotNegative], Meta(min_length=2, max_length=2)]],
            Meta(description="a list of ranges of samples, each [first, one after the last]"),
        ]: "leave_out",
        Text: "auto_register",
    }


class Loader(Choice):
    """data_loader: a class of MindSpore's, MindFormers' or ours."""

    kinds = {MEGATRON: MegatronLoader}
    others = (
        "CommonDataLoader HFDataLoader TrainingDataLoader MultiSourceDataLoader SFTDataLoader ADGenDataLoader "
        "ToolAlpacaDataLoader MindDataset TFRecordDataset"
    )


@dataclass(kw_only=True)
class Dataset:
    """train_dataset and eval_dataset."""

    data_loader: Loader | None = None
    input_columns: Columns | None = None
    passed_on = {
        Columns: "output_columns construct_args_key",
        Positive: "num_parallel_workers prefetch_size",
        bool: "python_multiprocessing drop_remainder numa_enable token_monitor",
        dict[str, Any]: "token_monitor_config tokenizer",
        only(1, "runner_config.epochs says how often the data is read"): "repeat",
        only(None, "runner_config.batch_size says it"): "batch_size",
        only(None, "parallel_config.micro_batch_num and runner_config.gradient_accumulation_steps say it"): (
            "micro_batch_num"
        ),
        only(None, FROM_TOP): "seed filepath_prefix autotune_per_step",
        only(False, FROM_TOP): "auto_tune profile",
        only(None, "run_mode says it"): "do_eval",
        only(False, "data_loader.config has reset_position_ids and reset_attention_mask"): "eod_reset",
        only(None, "data_loader.config.eod says it"): "eod_token_id",
        only(False, "a compiled model has one seq_length"): "dynamic_batch",
        only(None, "only dynamic_batch reads it"): "divisor remainder pad_token_id",
        only(None, "model.model_config.input_sliced_sig says it"): "input_sliced_sig",
        only(None, "it is a key of data_loader"): "dataset_dir type max_length",
        only(None, "MindFormers 1.9 has no data that reads it"): "mixup_op text_transforms image_transforms",
    }

    @property
    def megatron(self) -> MegatronLoader | None:
        """The loader, when it reads Megatron .bin/.idx files."""
        return self.data_loader if isinstance(self.data_loader, MegatronLoader) else None


@dataclass(kw_only=True)
class DatasetTask:
    """train_dataset_task and eval_dataset_task."""

    type: Literal["CausalLanguageModelDataset", "GeneralDataset", "KeyWordGenDataset", "MultiTurnDataset"]
    passed_on = {dict[str, Any]: "dataset_config", Text: "auto_register"}


@dataclass(kw_only=True)
class Tokenizer:
    """processor.tokenizer."""

    tokenizer_file: Text | None = None
    passed_on = {
        only("PreTrainedTokenizerFast", "tokenizer_file is read, which is that class's"): "type",
        only(None, "a tokenizer is its tokenizer.json, named by tokenizer_file"): "auto_register vocab_file",
    }


@dataclass(kw_only=True)
class Processor:
    """The `processor` section."""

    tokenizer: Tokenizer | None = None
    passed_on = {only(None, "run_mode predict reads tokenizer.tokenizer_file only"): "type return_tensors"}


@dataclass(kw_only=True)
class AdamW:
    """MindFormers' AdamW."""

    type: str
    learning_rate: PositiveNumber | None = None
    use_fused: bool = False  # Ascend's own operator; the next two need it
    amsgrad: bool = False
    maximize: bool = False
    passed_on = {
        NotNegativeNumber: "weight_decay",
        Betas: "betas",
        PositiveNumber: "eps",
        bool: "swap",
        Text: "auto_register",
    }


@dataclass(kw_only=True)
class Muon:
    """training/muon.py."""

    type: str
    learning_rate: PositiveNumber | None = None
    qk_clip_threshold: PositiveNumber | None = None  # the largest attention logit that stays; None: any does
    passed_on = {
        NotNegativeNumber: "weight_decay",
        PositiveNumber: "matched_adamw_rms adamw_eps",
        Fraction: "momentum",
        Betas: "adamw_betas",
        bool: "nesterov",
        Annotated[int, Meta(ge=1, le=99)]: "ns_steps",
        Text: "auto_register",
    }


class Optimizer(Choice):
    """The `optimizer` section."""

    kinds = {"AdamW": AdamW, "Muon": Muon}
    refused = {
        "PmaAdamW": "it needs get_model_parameters, which only MindFormers' own models have",
    }
    others = (
        "Came Adam AdamWeightDecay AdamOffload Lamb LARS SGD Momentum RMSProp Adagrad AdaFactor AdaMax "
        "Adadelta ASGD Rprop FTRL LazyAdam ProximalAdagrad adam adafactor adagrad sgd"
    )


@dataclass(kw_only=True)
class WarmUp:
    """What MindFormers' schedules that warm up share."""

    type: str
    learning_rate: PositiveNumber
    passed_on = {
        NotNegative: "warmup_steps",
        Fraction: "warmup_ratio",
        NotNegativeNumber: "warmup_lr_init",
        AllOr: "total_steps",
        Text: "auto_register",
        only(None, "MindFormers 1.9 counts by warmup_ratio wherever it allows warmup_epochs"): "warmup_epochs",
        only(None, "this schedule ends at a rate of its own; CosineWithWarmUpLR has lr_end"): "lr_end",
    }


@dataclass(kw_only=True)
class WarmUpCosine(WarmUp):
    """CosineWithWarmUpLR."""

    lr_end: NotNegativeNumber | None = None
    passed_on = {PositiveNumber: "num_cycles", Positive: "decay_steps", Fraction: "decay_ratio"}


@dataclass(kw_only=True)
class WarmupStableCosineSteps:
    """The report's schedule (training/lr_schedule.py)."""

    type: str
    learning_rate: PositiveNumber
    lr_end: NotNegativeNumber
    warmup_steps: NotNegative
    stable_steps: NotNegative
    decay_steps: Positive
    final_lr: NotNegativeNumber | None = None
    final_start_step: NotNegative | None = None


class Schedule(Choice):
    """The `lr_schedule` section."""

    others = (
        "ConstantWithCoolDownLR CosineAnnealingLR CosineAnnealingWarmRestarts polynomial linear "
        "CosineWithRestartsAndWarmUpLR PolynomialWithWarmUpLR WarmUpStableDecayLR cosine_annealing "
        "cosine_annealing_warm_restarts cosine_with_restarts"
    )
    refused = dict.fromkeys(
        ["CosineDecayLR", "ExponentialDecayLR", "InverseDecayLR", "NaturalExpDecayLR", "PolynomialDecayLR", "WarmUpLR"],
        "MindFormers 1.9 gives every schedule total_steps, which MindSpore's own do not take",
    ) | {"LearningRateWiseLayer": "it takes another schedule, which a YAML cannot give"}

    kinds = {
        "ConstantWarmUpLR": WarmUp,
        "constant_with_warmup": WarmUp,
        "LinearWithWarmUpLR": WarmUp,
        "CosineWithWarmUpLR": WarmUpCosine,
        "cosine": WarmUpCosine,
        "WarmupStableCosineStepsLR": WarmupStableCosineSteps,
    }


@dataclass(kw_only=True)
class GroupedSchedule:
    """grouped_lr_schedule: a schedule for the parameters that an item of `grouped` names, and one for the others."""

    default: Schedule
    grouped: Annotated[list[dict[str, Any]], Meta(min_length=1)]

    def __post_init__(self):
        rule = "every item needs a type, a learning_rate and params, a list of the parameters' names or patterns"
        whole = all(isinstance(item.get("params"), list) and item["params"] for item in self.grouped)
        named = all("type" in item and "learning_rate" in item for item in self.grouped)
        require(whole and named, "grouped_lr_schedule.grouped", self.grouped, rule)


@dataclass(kw_only=True)
class Tensorboard:
    """The `tensorboard` section: of MindFormers' MFLossMonitor and TrainingStateMonitor."""

    tensorboard_dir: Text
    passed_on = {
        Positive: "tensorboard_queue_size",
        bool: "log_loss_scale_to_tensorboard log_timers_to_tensorboard",
        only(False, OTHER_LAYERS): "log_expert_load_to_tensorboard",
    }


@dataclass(kw_only=True)
class LossScale:
    """runner_wrapper.scale_sense with a class."""

    type: str
    loss_scale_value: Annotated[float, Meta(ge=1)]


class ScaleSense(Choice):
    """runner_wrapper.scale_sense."""

    kinds = {"FixedLossScaleUpdateCell": LossScale}
    others = "DynamicLossScaleUpdateCell AdaptiveLossScaleUpdateCell"


@dataclass(kw_only=True)
class TrainOneStep:
    """The wrapper of a step without a pipeline (training/wrapper.py); with one, MindFormers takes its own."""

    type: str
    scale_sense: Annotated[float, Meta(ge=1)] | ScaleSense = 1.0
    passed_on = {
        bool: "use_clip_grad",
        PositiveNumber: "max_grad_norm",
        Text: "auto_register",
        only(False, LOCAL_NORMS): "local_norm",
    }


class Wrapper(Choice):
    """The `runner_wrapper` section."""

    kinds = {"MFTrainOneStepCell": TrainOneStep, "LoweredTrainStep": TrainOneStep}
    others = ""
    refused = {
        "MFPipelineWithLossScaleCell": "MindFormers takes it by itself with a pipeline; write MFTrainOneStepCell",
        "mf_wrapper": "that is MindFormers' step of an NPU without a pipeline; write MFTrainOneStepCell",
    } | dict.fromkeys(
        ["TrainOneStepCell", "TrainOneStepWithLossScaleCell", "loss_scale_wrapper", "wrapper"],
        "MindFormers gives every step more than MindSpore's own take; write MFTrainOneStepCell",
    )


@dataclass(kw_only=True)
class Monitors:
    """monitors of TrainingMetrics: every how many steps each looks; None: never (training/monitors.py)."""

    gradient_norms: Positive | None = None  # before clipping; keeps a copy of the first moments during the step
    weight_norms: Positive | None = None
    update_norms: Positive | None = None  # of what the step changed; keeps a copy of the weights during the step
    moment_norms: Positive | None = None  # of AdamW's first and second moments
    experts: Positive | None = None  # entropy of the loads, experts without a token, the share that was dropped
    attention_logits: Positive | None = None  # the largest of each layer; its graph keeps those of every head
    times: Positive | None = None  # seconds in the step, and between steps


@dataclass(kw_only=True)
class TrainingMetrics:
    """training/metrics.py."""

    type: str
    monitors: Monitors | None = None
    passed_on = {
        Text: "output_dir tensorboard_dir",
        Positive: "per_print_times",
        PositiveNumber: "device_peak_tflops",
        NotNegative: "max_skipped_steps",
    }


@dataclass(kw_only=True)
class CheckpointMonitor:
    """training/checkpoint_monitor.py."""

    type: str
    directory: Text | None = None
    passed_on = {
        str: "prefix",
        Positive: "save_checkpoint_steps keep_checkpoint_max",
        Positive | None: "keep_every_steps",
        bool: "async_save check_health",
        Annotated[float, Meta(gt=1)]: "embedding_norm_factor",
        PositiveNumber | None: "max_expert_bias",
        Annotated[bool, Only(False, "every rank saves its own part")]: "integrated_save",
        Literal["safetensors"]: "checkpoint_format",
    }


@dataclass(kw_only=True)
class AdapterMonitor(CheckpointMonitor):
    """training/adapter_monitor.py."""

    passed_on = {str: "base_model"}


@dataclass(kw_only=True)
class TopkBiasBalance:
    """training/topk_bias_callback.py."""

    type: str
    balance_via_topk_bias: bool = True


@dataclass(kw_only=True)
class LossMonitor:
    """MindFormers' MFLossMonitor."""

    type: str
    passed_on = {Positive: "per_print_times"}


@dataclass(kw_only=True)
class ParallelCheck:
    """training/parallel_check.py."""

    type: str
    folder: Text


class Callback(Choice):
    """An item of `callbacks`."""

    kinds = {
        "TrainingMetrics": TrainingMetrics,
        "CheckpointMonitor": CheckpointMonitor,
        "AdapterMonitor": AdapterMonitor,
        "TopkBiasBalanceCallback": TopkBiasBalance,
        "MFLossMonitor": LossMonitor,
        "ParallelCheck": ParallelCheck,
    }
    others = (
        "FlopsUtilizationCollector History LossMonitor ProfileMonitor SDCMonitor StressDetectCallBack "
        "StressTestModelMonitor SummaryCollector SummaryMonitor TimeMonitor TrainCallBack TrainingStateMonitor"
    )
    refused = (
        dict.fromkeys(["ModelCheckpoint", "OnRequestExit", "TrainFaultTolerance"], CHECKPOINTS)
        | dict.fromkeys(["EarlyStopping", "EvalCallBack", "ReduceLROnPlateau"], NO_EVALUATION)
        | dict.fromkeys(
            ["ColdHotExpertMonitor", "ExpertMigrateCallback", "MaxLogitsMonitor", "MoEDropRateCallback"],
            "it needs MindFormers' own layers; TrainingMetrics reports the experts' loads",
        )
        | {"LearningRateScheduler": "it takes a function, which a YAML cannot give; see lr_schedule"}
    )
