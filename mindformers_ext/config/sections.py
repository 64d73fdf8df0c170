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
)

MEGATRON = "BlendedMegatronDatasetDataLoader"
Text = Annotated[str, Meta(min_length=1)]
AllOr = Annotated[int, Meta(ge=-1, description="a whole number of at least 1, or -1 for all")]
Layers = Annotated[
    bool | Annotated[list[int], Meta(min_length=1)],
    Meta(description="True, False, or a list with a number of layers per pipeline stage"),
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
SearchMode = Literal["sharding_propagation", "dynamic_programming", "recursive_programming"]
Formats = Literal["log", "tensorboard"] | list[Literal["log", "tensorboard"]] | None
Betas = Annotated[list[Fraction], Meta(min_length=2, max_length=2)]
Sizes = Annotated[list[NotNegative], Meta(min_length=3, max_length=3)]
Columns = Annotated[list[str], Meta(min_length=1)]
GigaBytes = Annotated[str, Meta(pattern=r"^[0-9]+(\.[0-9]+)?GB$", description="a text like '55GB'")]


@dataclass(kw_only=True)
class RunnerConfig:
    """How long and in which pieces a run goes over its data."""

    batch_size: Positive = 1  # sequences of a data-parallel rank and micro-batch
    gradient_accumulation_steps: Positive = 1  # micro-batches of a step, without a pipeline
    passed_on = {Positive: "epochs num_classes", bool: "sink_mode", AllOr: "sink_size", NotNegative: "stop_step"}


@dataclass(kw_only=True)
class Trainer:
    """The trainer's class and the model's name."""

    type: Literal["CausalLanguageModelingTrainer"]
    passed_on = {Text: "model_name auto_register"}


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
        PositiveNumber: "mem_coeff",
        Annotated[int, Only(1, "the sequence is split as sharding.py says")]: "seq_split_num ulysses_degree_in_cp",
        Annotated[str, Only("colossalai_cp", "sharding.py gathers keys and values")]: "context_parallel_algo",
        bool | None: "optimizer_shard",
    }


@dataclass(kw_only=True)
class RecomputeConfig:
    """What is computed again in the backward instead of kept."""

    recompute: Layers = False
    select_recompute: Layers = False
    passed_on = {
        bool: "parallel_optimizer_comm_recompute select_comm_recompute mp_comm_recompute recompute_slice_activation "
        "select_recompute_exclude select_comm_recompute_exclude"
    }


@dataclass(kw_only=True)
class SwapConfig:
    """Activations kept on the host."""

    passed_on = {bool: "swap", list[dict] | None: "layer_swap op_swap", Positive: "default_prefetch"}


@dataclass(kw_only=True)
class OptimizerShards:
    """parallel_optimizer_config: how weights and optimizer states are split over their copies."""

    gradient_accumulation_shard: bool = False
    parallel_optimizer_threshold: NotNegative = 64  # KiB; smaller parameters are not split
    optimizer_weight_shard_size: Annotated[
        int, Meta(ge=-1, description="a whole number of at least 1, or -1 for all copies of a weight")
    ] = -1


@dataclass(kw_only=True)
class StrategyCheckpoint:
    """strategy_ckpt_config: MindSpore's own file of strategies."""

    passed_on = {str: "load_file save_file", bool: "only_trainable_params"}


@dataclass(kw_only=True)
class PipelineConfig:
    """pipeline_config of the parallel section."""

    pipeline_interleave: bool = False
    passed_on = {Literal["gpipe", "1f1b", "seqpipe", "seqvpp", "seqsmartvpp", "zero_bubble_v"]: "pipeline_scheduler"}


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
    strategy_ckpt_config: StrategyCheckpoint | None = None
    pipeline_config: PipelineConfig = field(default_factory=PipelineConfig)
    passed_on = {
        bool: "gradients_mean gradient_fp32_sync loss_repeated_mean enable_alltoall sharding_propagation auto_pipeline "
        "optimizer_weight_shard_aggregated_save pipeline_result_broadcast force_fp32_communication parameter_broadcast "
        "init_param_in_compile auto_parallel_new_interface dump_local_norm dump_device_local_norm",
        SearchMode: "search_mode auto_parallel_search_mode",
        str: "strategy_ckpt_save_file strategy_ckpt_load_file group_ckpt_save_file dump_local_norm_path",
        Positive: "pipeline_stages pipeline_segments device_num grad_accumulation_step",
        NotNegative: "global_rank",
        AllOr: "optimizer_weight_shard_size",
        list[Positive]: "all_reduce_fusion_config",
        dict[str, Any]: "comm_fusion",
        Literal["all_group_parallel", "same_server_group_parallel", "no_group_parallel"]: "communi_parallel_mode",
    }


@dataclass(kw_only=True)
class JitConfig:
    """jit_config of the context."""

    passed_on = {
        Literal["O0", "O1", "O2"]: "jit_level",
        Literal["auto", "sink", "one"]: "exec_mode",
        Literal["STRICT", "LAX"]: "jit_syntax_level",
        Literal["on", "off"]: "infer_boost",
    }


@dataclass(kw_only=True)
class AscendConfig:
    """ascend_config of the context."""

    parallel_speed_up_json_path: Text | None = None
    passed_on = {
        str: "precision_mode atomic_clean_policy exception_dump op_precision_mode op_debug_option topo_order",
        bool: "jit_compile matmul_allow_hf32 conv_allow_hf32 hccl_watchdog",
        dict[str, Any]: "ge_options",
        Positive: "host_scheduling_max_threshold",
    }


@dataclass(kw_only=True)
class Context:
    """The `context` section: MindSpore's device and compiler. Only some keys mean something on CPU (run_modes)."""

    device_target: Literal["CPU", "Ascend"] = "Ascend"
    max_device_memory: GigaBytes | None = None
    jit_config: JitConfig | None = None
    ascend_config: AscendConfig | None = None
    passed_on = {
        Literal[0, 1, "GRAPH_MODE", "PYNATIVE_MODE"]: "mode",
        GigaBytes: "mempool_block_size variable_memory_max_size",
        Literal["O0", "O1"]: "memory_optimize_level",
        Literal["ON", "OFF"]: "memory_offload deterministic",
        Positive: "max_call_depth",
        NotNegative: "device_id inter_op_parallel_num runtime_num_threads op_timeout",
        bool | Literal[0, 1, 2, 3]: "save_graphs",
        Literal[0, 1, 2, 3]: "dataset_broadcast_opt_level",
        Literal[0, 1, 2, "STRICT", "COMPATIBLE", "LAX"]: "jit_syntax_level",
        bool: "save_compile_cache load_compile_cache precompile_only enable_auto_mixed_precision enable_sparse "
        "enable_reduce_precision enable_profiling check_bprop grad_for_scalar pynative_synchronize "
        "reserve_class_name_in_scope",
        str: "save_graphs_path profiling_options print_file_path env_config_path auto_tune_mode",
        list[str]: "affinity_cpu_list",
        dict[str, Any]: "affinity_config",
    }


@dataclass(kw_only=True)
class MonitorConfig:
    """MindFormers' TrainingStateMonitor."""

    monitor_on: bool = False
    passed_on = {
        str: "dump_path",
        list[str] | None: "target",
        bool: "invert print_struct check_for_global_norm",
        Positive: "step_interval global_norm_spike_count_threshold",
        Formats: "local_loss_format local_norm_format device_local_norm_format device_local_loss_format "
        "optimizer_state_format weight_state_format max_attention_logit_format",
        PositiveNumber: "global_norm_spike_threshold",
        PositiveNumber | None: "throughput_baseline",
        dict[str, Any] | None: "stable_rank_config health_checkpoint",
    }


@dataclass(kw_only=True)
class MegatronConfig:
    """data_loader.config of Megatron .bin/.idx files: bin_dataset/gpt_dataset.py says what each key does."""

    seq_length: Positive
    data_path: Shares | None = None
    train_data_path: Shares | None = None
    valid_data_path: Shares | None = None
    test_data_path: Shares | None = None
    passed_on = {
        Annotated[int, Meta(ge=0, lt=2**32)]: "random_seed seed",
        Split | None: "split",
        Annotated[int, Meta(ge=-1)]: "eod pad",
        bool: "reset_position_ids reset_attention_mask eod_mask_loss create_attention_mask create_compressed_eod_mask "
        "drop_last_partial_validation_sequence add_extra_token_to_sequence",
        Positive: "eod_pad_length compressed_eod_mask_length num_dataset_builder_threads",
        NotNegativeNumber: "mid_level_dataset_surplus",
        Text | None: "path_to_cache",
        Annotated[str | None, Only(None, "files are read from disks that are mounted")]: "s3_cache_path",
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
        Columns: "column_names",
        NotNegative: "first_sample",
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
        Positive: "batch_size num_parallel_workers repeat prefetch_size autotune_per_step divisor max_length "
        "micro_batch_num",
        NotNegative: "seed eod_token_id pad_token_id remainder",
        bool: "python_multiprocessing drop_remainder numa_enable auto_tune profile eod_reset dynamic_batch "
        "token_monitor do_eval input_sliced_sig",
        str: "filepath_prefix dataset_dir type",
        dict[str, Any]: "token_monitor_config tokenizer mixup_op text_transforms image_transforms",
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
    passed_on = {Text: "type auto_register vocab_file"}


@dataclass(kw_only=True)
class Processor:
    """The `processor` section."""

    tokenizer: Tokenizer | None = None
    passed_on = {Text: "type return_tensors"}


@dataclass(kw_only=True)
class AdamW:
    """MindFormers' AdamW."""

    type: str
    learning_rate: PositiveNumber | None = None
    passed_on = {
        NotNegativeNumber: "weight_decay",
        Betas: "betas",
        PositiveNumber: "eps",
        bool: "amsgrad maximize use_fused swap",
        Text: "auto_register",
    }


class Optimizer(Choice):
    """The `optimizer` section."""

    kinds = {"AdamW": AdamW}
    others = (
        "PmaAdamW Muon Came Adam AdamWeightDecay AdamOffload Lamb LARS SGD Momentum RMSProp Adagrad AdaFactor AdaMax "
        "Adadelta ASGD Rprop FTRL LazyAdam ProximalAdagrad adam adafactor adagrad sgd"
    )


@dataclass(kw_only=True)
class WarmUp:
    """What schedules that warm up share."""

    type: str
    learning_rate: PositiveNumber
    lr_end: NotNegativeNumber | None = None
    passed_on = {
        NotNegative: "warmup_steps warmup_epochs",
        Fraction: "warmup_ratio",
        NotNegativeNumber: "warmup_lr_init",
        AllOr: "total_steps",
        bool: "scale",
        Text: "auto_register",
    }


@dataclass(kw_only=True)
class WarmUpCosine(WarmUp):
    """CosineWithWarmUpLR."""

    passed_on = {PositiveNumber: "num_cycles", Positive: "decay_steps", Fraction: "decay_ratio"}


@dataclass(kw_only=True)
class WarmupStableCosineSteps(WarmUp):
    """The report's schedule (training/lr_schedule.py)."""

    lr_end: NotNegativeNumber
    warmup_steps: NotNegative
    stable_steps: NotNegative
    decay_steps: Positive
    final_lr: NotNegativeNumber | None = None
    final_start_step: NotNegative | None = None


class Schedule(Choice):
    """The `lr_schedule` section."""

    others = (
        "ConstantWithCoolDownLR CosineAnnealingLR CosineAnnealingWarmRestarts CosineDecayLR WarmUpLR polynomial linear "
        "LearningRateWiseLayer CosineWithRestartsAndWarmUpLR ExponentialDecayLR InverseDecayLR NaturalExpDecayLR "
        "PolynomialDecayLR PolynomialWithWarmUpLR WarmUpStableDecayLR cosine_annealing cosine_annealing_warm_restarts "
        "cosine_with_restarts"
    )

    kinds = {
        "ConstantWarmUpLR": WarmUp,
        "constant_with_warmup": WarmUp,
        "LinearWithWarmUpLR": WarmUp,
        "CosineWithWarmUpLR": WarmUpCosine,
        "cosine": WarmUpCosine,
        "WarmupStableCosineStepsLR": WarmupStableCosineSteps,
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
    passed_on = {bool: "use_clip_grad local_norm", PositiveNumber: "max_grad_norm", Text: "auto_register"}


class Wrapper(Choice):
    """The `runner_wrapper` section."""

    kinds = {"MFTrainOneStepCell": TrainOneStep, "mf_wrapper": TrainOneStep, "LoweredTrainStep": TrainOneStep}
    others = "MFPipelineWithLossScaleCell TrainOneStepCell TrainOneStepWithLossScaleCell loss_scale_wrapper wrapper"


@dataclass(kw_only=True)
class TrainingMetrics:
    """training/metrics.py."""

    type: str
    passed_on = {
        Text: "output_dir",
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
        bool: "async_save",
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
        "ColdHotExpertMonitor EarlyStopping EvalCallBack ExpertMigrateCallback FlopsUtilizationCollector History "
        "LearningRateScheduler LossMonitor MaxLogitsMonitor MoEDropRateCallback ModelCheckpoint OnRequestExit "
        "ProfileMonitor ReduceLROnPlateau SDCMonitor StressDetectCallBack StressTestModelMonitor SummaryCollector "
        "SummaryMonitor TimeMonitor TrainCallBack TrainFaultTolerance TrainingStateMonitor"
    )
