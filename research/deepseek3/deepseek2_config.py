"""What a DeepSeek-V2 run asks for: the `model_config` and `moe_config` sections of the YAML, typed and checked.

Names are MindFormers' YAML keys; the comment beside a field gives HuggingFace's word where it differs.
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import mindformers_ext  # noqa: F401  first: it prepares the import of MindFormers (later_imports.py)

# isort: split
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ext.config.yaml_files import refuse_unknown
from mindformers_ext.errors import ConfigError

__all__ = ["ConfigError", "DeepseekV2Config", "LoraConfig", "MoeConfig", "YarnConfig"]

# What MindFormers' Trainer adds to model_config for parts of MindFormers that this model does not use.
TRAINER_KEYS = ("disable_lazy_inline", "dataset_config", "calculate_per_token_loss")
FLOAT_TYPES = ("float32", "float16", "bfloat16")
POSITIVE = (
    "batch_size",
    "seq_length",
    "hidden_size",
    "num_layers",
    "num_heads",
    "vocab_size",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "multiple_of",
)
DTYPES = (
    "compute_dtype",
    "layernorm_compute_type",
    "softmax_compute_type",
    "rotary_dtype",
    "router_dense_type",
    "param_init_type",
)


def require(holds: bool, key: str, value: Any, rule: str) -> None:
    """Raise ConfigError `key = value: rule` unless `holds`."""
    if not holds:
        raise ConfigError(f"{key} = {value!r}: {rule}")


@dataclass(kw_only=True)
class YarnConfig:
    """Parameters of YaRN (arXiv 2309.00071), as in HuggingFace's `rope_scaling`; defaults are DeepSeek-V3's."""

    factor: float = 40.0  # context extension factor
    original_max_position_embeddings: int = 4096  # context length of pretraining
    beta_fast: float = 32.0  # rotations above which a dimension is left alone
    beta_slow: float = 1.0  # rotations below which a dimension is interpolated
    mscale: float = 1.0  # temperature of cos/sin
    mscale_all_dim: float = 1.0  # temperature of the softmax scale

    @classmethod
    def from_dict(cls, values: dict) -> "YarnConfig":
        """Build from the YAML's `model_config.scaling_factor` mapping."""
        refuse_unknown("model_config.scaling_factor", values, (f.name for f in dataclasses.fields(cls)))
        return cls(**values)


ATTENTION_TARGETS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FFN_TARGETS = ("gate_proj", "up_proj", "down_proj")
FFN_PLACES = {"mlp": r"mlp", "shared_experts": r"mlp\.shared_experts", "experts": r"mlp\.experts\.\d+"}


@dataclass(kw_only=True)
class LoraConfig:
    """The `pet_config` of model_config: LoRA adapters (lora.py). Without a rank the model has none.

    target_modules are the leaves of HuggingFace's module names; of FFNs also with their place: `mlp.up_proj` is the
    dense layers', `shared_experts.up_proj` and `experts.up_proj` the shared and the routed experts', `up_proj` all.
    """

    lora_rank: int = 0
    lora_alpha: float = 32.0  # adapters are multiplied by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # of the adapters' input
    target_modules: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def from_dict(cls, values: dict | None) -> "LoraConfig":
        """Build from the YAML's mapping."""
        values = dict(values or {})
        refuse_unknown("model_config.pet_config", values, (f.name for f in dataclasses.fields(cls)))
        return cls(**values)

    def __post_init__(self):
        name, rank = "model_config.pet_config", self.lora_rank
        require(isinstance(rank, int) and rank >= 0, f"{name}.lora_rank", rank, "must be a whole number, 0 for none")
        require(self.lora_alpha > 0, f"{name}.lora_alpha", self.lora_alpha, "must be above 0")
        require(0 <= self.lora_dropout < 1, f"{name}.lora_dropout", self.lora_dropout, "must be from 0 to below 1")
        require(bool(rank) == bool(self.target_modules), name, vars(self), "needs both lora_rank and target_modules")
        legal = {*ATTENTION_TARGETS, *FFN_TARGETS, *(f"{place}.{part}" for place in FFN_PLACES for part in FFN_TARGETS)}
        for target in self.target_modules:
            rule = f"can be {', '.join(sorted(legal))}; the router is never adapted"
            require(target in legal, f"{name}.target_modules", target, rule)
        routed = {"experts." + part for part in FFN_TARGETS} | set(FFN_TARGETS)
        require(
            not (self.lora_dropout and routed & set(self.target_modules)),
            f"{name}.lora_dropout",
            self.lora_dropout,
            "must be 0 with routed experts, whose adapters are added to the weights; name mlp.* and shared_experts.*",
        )

    @property
    def scale(self) -> float:
        """lora_alpha / lora_rank."""
        return self.lora_alpha / self.lora_rank

    def pattern(self) -> str:
        """Regular expression of HuggingFace's names of the adapted modules, as PEFT's target_modules takes it."""
        found = [rf"self_attn\.{name}" for name in ATTENTION_TARGETS if name in self.target_modules]
        for place, path in FFN_PLACES.items():
            parts = [p for p in FFN_TARGETS if p in self.target_modules or f"{place}.{p}" in self.target_modules]
            found += [rf"{path}\.({'|'.join(parts)})"] if parts else []
        return rf"model\.layers\.\d+\.({'|'.join(found)})"

    def wants(self, module: str) -> bool:
        """True when the module of this HuggingFace name has an adapter."""
        return self.lora_rank > 0 and re.fullmatch(self.pattern(), module) is not None

    def has(self, target: str) -> bool:
        """True for a target, such as `q_a_proj` or `shared_experts.up_proj`, that has adapters."""
        return self.lora_rank > 0 and (target in self.target_modules or target.split(".")[-1] in self.target_modules)

    def expert_matrices(self) -> int:
        """LoRA matrices of a layer's routed experts: two for each of gate, up and down that is adapted."""
        return 2 * sum(self.has(f"experts.{part}") for part in FFN_TARGETS)


@dataclass(kw_only=True)
class MoeConfig:
    """The `moe_config` section. Expert counts are per layer."""

    expert_num: int = 1  # HF n_routed_experts; 1 = a dense model
    num_experts_chosen: int = 1  # HF num_experts_per_tok, K
    shared_expert_num: int = 0  # HF n_shared_experts
    moe_intermediate_size: int = 1407  # width of one expert
    first_k_dense_replace: int = 0  # leading layers with a dense FFN
    # router
    routing_policy: str = "TopkRouterV2"
    use_gating_sigmoid: bool = False  # sigmoid scores (V3) or softmax (V2); HF scoring_func
    topk_method: str = "greedy"  # greedy | group_limited_greedy | noaux_tc
    n_group: int | None = None  # expert groups for group-limited selection
    topk_group: int | None = None  # groups a token may use
    norm_topk_prob: bool = False  # gates normalised to sum 1 before scaling
    routed_scaling_factor: float = 1.0  # gates multiplied by this, after normalising
    router_dense_type: str = "float32"  # dtype of the gate's matmul; scores are always float32
    use_fused_ops_topkrouter: bool = False  # CPU only: no Ascend operator of MindSpore 2.9 selects as DeepSeek does
    # balancing
    balance_via_topk_bias: bool = False  # the callback updates the selection bias each step
    topk_bias_update_rate: float = 0.0  # gamma of the update
    aux_loss_types: list[str] | None = None  # of expert (sequence-wise), device, comm
    aux_loss_factors: list[float] | None = None  # one alpha per type
    aux_loss_factor: float = 0.05  # alpha of every type when aux_loss_factors is not given
    z_loss_factor: float = 0.0  # times mean(logsumexp(logits)^2)
    # dispatch
    use_gmm: bool = False  # True: dropless, sorted tokens, grouped matmul; False: capacity
    use_fused_ops_permute: bool = False  # fused token permute/unpermute where the device has it
    capacity_factor: float = 1.1  # capacity = ceil(K * group tokens * factor / experts), capped at the group
    expert_group_size: int | None = None  # consecutive tokens over which capacity is counted; None = a sequence
    enable_sdrop: bool = False  # overflow drops the last tokens (True) or the lowest-ranked choices (False)
    group_wise_a2a: bool = False  # all-to-all in two hops: inside the model-parallel group, then across
    expert_model_parallel: int = 1  # tensor parallelism inside an expert: only 1

    @classmethod
    def from_mindformers(cls, values: Any) -> "MoeConfig":
        """Build from a mapping of YAML keys, MindFormers' own MoEConfig object, or a MoeConfig."""
        if isinstance(values, cls):
            return values
        if values is None:
            return cls()
        fields = {f.name for f in dataclasses.fields(cls)}
        if isinstance(values, dict):
            refuse_unknown("moe_config", values, fields)
            return cls(**values)
        values = values.to_dict()  # MindFormers' object carries options for its other models: not ours to use
        chosen = {k: v for k, v in values.items() if k in fields}
        chosen["router_dense_type"] = dtype_name(chosen["router_dense_type"])
        chosen["first_k_dense_replace"] = int(chosen["first_k_dense_replace"])
        chosen["expert_model_parallel"] = chosen["expert_model_parallel"] or 1
        return cls(**chosen)

    def to_dict(self) -> dict:
        """All values, ready for JSON."""
        return dataclasses.asdict(self)

    def to_diff_dict(self) -> dict:
        """Values that differ from the defaults (MindFormers prints a config so)."""
        default = MoeConfig().to_dict()
        return {key: value for key, value in self.to_dict().items() if value != default[key]}

    def __post_init__(self):
        self.aux_loss_types = list(self.aux_loss_types or [])
        if not self.aux_loss_factors:
            self.aux_loss_factors = [self.aux_loss_factor] * len(self.aux_loss_types)
        self.n_group = self.n_group or 1
        self.topk_group = self.topk_group or self.n_group
        self._check_router()
        self._check_balance()
        self._check_dispatch()

    def _check_router(self) -> None:
        experts, chosen = self.expert_num, self.num_experts_chosen
        require(experts >= 1, "moe_config.expert_num", experts, "must be at least 1")
        require(
            1 <= chosen <= experts,
            "moe_config.num_experts_chosen",
            chosen,
            f"a token chooses between 1 and expert_num = {experts} experts",
        )
        require(
            self.routing_policy == "TopkRouterV2",
            "moe_config.routing_policy",
            self.routing_policy,
            "DeepSeek routes with 'TopkRouterV2'",
        )
        methods = ("greedy", "group_limited_greedy", "noaux_tc")
        require(self.topk_method in methods, "moe_config.topk_method", self.topk_method, f"must be one of {methods}")
        require(
            experts % self.n_group == 0,
            "moe_config.n_group",
            self.n_group,
            f"must divide expert_num = {experts}",
        )
        require(
            1 <= self.topk_group <= self.n_group,
            "moe_config.topk_group",
            self.topk_group,
            f"must lie between 1 and n_group = {self.n_group}",
        )
        eligible = experts // self.n_group * self.topk_group
        require(
            eligible >= chosen,
            "moe_config.topk_group",
            self.topk_group,
            f"leaves {eligible} experts a token may use, fewer than num_experts_chosen = {chosen}",
        )
        require(
            self.router_dense_type in FLOAT_TYPES,
            "router_dense_type",
            self.router_dense_type,
            f"must be one of {FLOAT_TYPES}",
        )

    def _check_balance(self) -> None:
        for kind in self.aux_loss_types:
            require(
                kind in ("expert", "device", "comm"),
                "moe_config.aux_loss_types",
                kind,
                "each must be expert, device or comm",
            )
        require(
            len(self.aux_loss_factors) == len(self.aux_loss_types),
            "moe_config.aux_loss_factors",
            self.aux_loss_factors,
            f"needs one number for each of aux_loss_types = {self.aux_loss_types}",
        )
        require(
            self.topk_bias_update_rate >= 0,
            "moe_config.topk_bias_update_rate",
            self.topk_bias_update_rate,
            "must not be negative",
        )
        require(
            not self.balance_via_topk_bias or self.topk_method == "noaux_tc",
            "moe_config.balance_via_topk_bias",
            True,
            f"needs topk_method 'noaux_tc', which has a bias; topk_method is {self.topk_method!r}",
        )

    def _check_dispatch(self) -> None:
        require(
            self.expert_model_parallel == 1,
            "moe_config.expert_model_parallel",
            self.expert_model_parallel,
            "experts are not split inside; use 1 and split them over parallel_config.expert_parallel",
        )
        require(self.capacity_factor > 0, "moe_config.capacity_factor", self.capacity_factor, "must be greater than 0")
        require(
            self.moe_intermediate_size > 0,
            "moe_config.moe_intermediate_size",
            self.moe_intermediate_size,
            "must be at least 1",
        )
        require(
            self.expert_group_size is None or self.expert_group_size > 0,
            "moe_config.expert_group_size",
            self.expert_group_size,
            "must be at least 1 token",
        )


def dtype_name(dtype: Any) -> str:
    """'float32' for 'float32', mindspore.float32 or 'Float32'."""
    return str(dtype).lower()


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
@dataclass(init=False, kw_only=True, eq=False, repr=False)
class DeepseekV2Config(PretrainedConfig):
    """The `model_config` section of a DeepSeek-V2 run (V2, V2-Lite, Coder-V2-Lite).

    Built by MindFormers from the YAML; `moe_config` and `parallel_config` arrive from their own sections.

    Raises:
        ConfigError: unknown key, or a value that cannot work, in one sentence.
    """

    model_type = "deepseekv2"

    # sizes
    batch_size: int = 1
    seq_length: int = 4096  # tokens of a training sample
    hidden_size: int = 2048
    num_layers: int = 27
    num_heads: int = 16
    n_kv_heads: int | None = None  # MLA has as many as num_heads
    max_position_embeddings: int | None = None  # default seq_length
    intermediate_size: int | None = 10944  # dense FFN; None: 8/3 of hidden_size, rounded up to multiple_of
    multiple_of: int = 256
    vocab_size: int = 102400
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None  # None: queries come from one projection (V2-Lite)
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    # numerics
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    compute_dtype: str = "bfloat16"  # matmuls and the residual stream
    layernorm_compute_type: str = "float32"
    softmax_compute_type: str = "float32"
    rotary_dtype: str = "float32"
    router_dense_type: str = "float32"
    param_init_type: str = "float32"
    # tokens
    bos_token_id: int = 100000
    eos_token_id: int = 100001
    pad_token_id: int = 100001
    ignore_token_id: int = -100
    input_sliced_sig: bool = True  # True: samples carry shifted labels; False: input_ids has one token more
    # positions
    theta: float = 10000.0
    extend_method: str = "None"  # None | YARN
    scaling_factor: dict | None = None  # YaRN's parameters
    # operators
    use_flash_attention: bool = False
    use_fused_rope: bool = False
    use_fused_swiglu: bool = False
    use_fused_rms_norm: bool = False
    use_fused_cross_entropy: bool = False  # CPU: head and loss in one operator that keeps no logits
    # run
    offset: int | list[int] = 0  # layers more (or fewer) than num_layers // pipeline_stage, per stage
    return_extra_loss: bool = True  # add the balance losses to the loss
    use_past: bool = False
    checkpoint_name_or_path: str | None = ""
    # multi-token prediction (V3 only: 0 here)
    mtp_depth: int = 0
    mtp_loss_factor: float = 0.3
    # text generation
    max_decode_length: int = 1024
    do_sample: bool = False
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    repetition_penalty: float = 1.0

    def __init__(self, **given: Any):
        base = {k: given.pop(k) for k in ("parallel_config", "moe_config", "pet_config") if k in given}
        for key in TRAINER_KEYS:
            given.pop(key, None)
        known = {f.name: f.default for f in dataclasses.fields(self)}
        refuse_unknown("model_config", {k: v for k, v in given.items() if k not in ("type", "auto_register")}, known)
        super().__init__()
        self.pet_config = base.get("pet_config")
        self.lora = LoraConfig.from_dict(self.pet_config)
        for key, default in known.items():
            setattr(self, key, given.get(key, default))
        self.moe_config = base.get("moe_config")
        parallel = base.get("parallel_config") or TransformerOpParallelConfig()
        self.parallel_config = TransformerOpParallelConfig(**parallel) if isinstance(parallel, dict) else parallel
        self._derive()
        self._check_sizes()
        self._check_dtypes()
        self._check_positions()
        self._check_lora()

    def to_dict(self) -> dict:
        """All values, ready for JSON."""
        values = super().to_dict()
        values["moe_config"] = values.pop("_moe_config").to_dict()
        values["lora"] = dataclasses.asdict(values.pop("lora"))
        return values

    def default_moe_config(self) -> dict:
        """Values of `moe_config` that this model family assumes when the YAML does not say."""
        return {}

    @property
    def moe_config(self) -> MoeConfig:
        """The MoE section; assignment also takes a mapping or MindFormers' MoEConfig."""
        return self._moe_config

    @moe_config.setter
    def moe_config(self, values: Any) -> None:
        if values is None or isinstance(values, dict):
            values = {**self.default_moe_config(), **(values or {})}
        self._moe_config = MoeConfig.from_mindformers(values)

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def yarn(self) -> YarnConfig | None:
        """YaRN's parameters, or None when positions are not extended."""
        return None if self.extend_method == "None" else YarnConfig.from_dict(self.scaling_factor or {})

    def is_moe_layer(self, layer: int) -> bool:
        """True when decoder layer `layer` (from 0) has experts."""
        return self.moe_config.expert_num > 1 and layer >= self.moe_config.first_k_dense_replace

    def pipeline_stage_of(self, layer: int) -> int:
        """Pipeline stage of decoder layer `layer`; stage i holds num_layers // stages + offset[i] layers."""
        stages = self.parallel_config.pipeline_stage
        last = 0
        for stage, count in enumerate(self.layers_per_stage(stages)):
            last += count
            if layer < last:
                return stage
        return stages - 1  # MTP layers follow the last decoder layer

    def layers_per_stage(self, stages: int) -> list[int]:
        """Decoder layers of each pipeline stage."""
        extra = self.offset if isinstance(self.offset, list) else None
        if extra is None:  # an int: as MindFormers, the remainder goes to the last stages
            base, rest = divmod(self.num_layers, stages)
            return [base + (stage >= stages - rest) for stage in range(stages)]
        return [self.num_layers // stages + more for more in extra]

    def _derive(self) -> None:
        self.n_kv_heads = self.n_kv_heads or self.num_heads
        self.max_position_embeddings = self.max_position_embeddings or self.seq_length
        if self.intermediate_size is None:
            width = 8 * self.hidden_size // 3
            self.intermediate_size = -(-width // self.multiple_of) * self.multiple_of
        self.extend_method = str(self.extend_method)

    def _check_sizes(self) -> None:
        for key in POSITIVE:
            value = getattr(self, key)
            rule = "must be a whole number above 0"
            require(isinstance(value, int) and value > 0, f"model_config.{key}", value, rule)
        require(
            self.n_kv_heads == self.num_heads,
            "model_config.n_kv_heads",
            self.n_kv_heads,
            f"MLA has one key/value head per query head: leave it out or set num_heads = {self.num_heads}",
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            "model_config.qk_rope_head_dim",
            self.qk_rope_head_dim,
            "must be even: rotary positions turn pairs",
        )
        require(
            self.seq_length <= self.max_position_embeddings,
            "model_config.seq_length",
            self.seq_length,
            f"must not exceed max_position_embeddings = {self.max_position_embeddings}",
        )
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, key)
            require(
                0 <= value < self.vocab_size,
                f"model_config.{key}",
                value,
                f"must be a token id below vocab_size = {self.vocab_size}",
            )
        require(
            not self.use_past,
            "model_config.use_past",
            True,
            "this is a training system: it keeps no key/value cache; predict recomputes the prompt (or export and "
            "serve with vLLM)",
        )
        stages = self.parallel_config.pipeline_stage
        if isinstance(self.offset, list):
            require(
                len(self.offset) == stages and sum(self.layers_per_stage(stages)) == self.num_layers,
                "model_config.offset",
                self.offset,
                f"needs pipeline_stage = {stages} numbers that sum to {self.num_layers % stages} "
                f"(num_layers = {self.num_layers} less {stages} x {self.num_layers // stages})",
            )

    def _check_dtypes(self) -> None:
        for key in DTYPES:
            name = dtype_name(getattr(self, key))
            require(name in FLOAT_TYPES, f"model_config.{key}", name, f"must be one of {FLOAT_TYPES}")
            setattr(self, key, name)
        self.moe_config.router_dense_type = self.router_dense_type

    def _check_positions(self) -> None:
        require(
            self.extend_method in ("None", "YARN"),
            "model_config.extend_method",
            self.extend_method,
            "must be None or YARN",
        )
        require(
            self.extend_method == "YARN" or self.scaling_factor is None,
            "model_config.scaling_factor",
            self.scaling_factor,
            "only extend_method: YARN uses it",
        )
        require(
            self.mtp_depth in (0, 1), "model_config.mtp_depth", self.mtp_depth, "DeepSeek predicts 0 or 1 more token"
        )
        require(
            self.yarn is None or self.yarn.factor >= 1,
            "model_config.scaling_factor.factor",
            self.yarn and self.yarn.factor,
            "must be at least 1: YaRN extends the context",
        )

    def _check_lora(self) -> None:
        """Every target must exist: an adapter that is asked for and missing would go unnoticed."""
        moe, targets = self.moe_config, self.lora.target_modules
        dense = moe.expert_num == 1 or moe.first_k_dense_replace > 0
        routed = moe.expert_num > 1 and moe.first_k_dense_replace < self.num_layers
        places = {"mlp": dense, "shared_experts": routed and moe.shared_expert_num > 0, "experts": routed}
        absent = {"q_proj"} if self.q_lora_rank is not None else {"q_a_proj", "q_b_proj"}
        for target in targets:
            exists = places[target.split(".")[0]] if "." in target else target not in absent
            require(exists, "model_config.pet_config.target_modules", target, "this model has no such projection")
        require(
            not targets or self.mtp_depth == 0,
            "model_config.mtp_depth",
            self.mtp_depth,
            "must be 0 with pet_config: HuggingFace's models, for which adapters are saved, have no MTP layer",
        )
