"""What a DeepSeek model is: the sections `model.model_config` and `moe_config` of a YAML, typed and checked.

Names are MindFormers' YAML keys; the comment beside a field gives HuggingFace's word where it differs. The classes that
MindFormers finds by the YAML's `type` are research/deepseek3/deepseek{2,3,32}_config.py.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

from mindformers_ext.config.pipeline import FOLDED, Pipeline
from mindformers_ext.config.typed import (
    FloatType,
    NotNegative,
    NotNegativeNumber,
    Only,
    Positive,
    PositiveNumber,
    divisors_near,
    require,
)

MODEL, MOE = "model.model_config", "moe_config"
Offset = Annotated[
    Literal[0] | Annotated[list[int | list[int]], Meta(min_length=1)],
    Meta(description="0, or a list with a number of layers per pipeline stage, or one such list per chunk"),
]
NO_CACHE = (
    "this is a training system that keeps no key/value cache; predict recomputes the prompt (or export and serve with "
    "vLLM)"
)
# Other names of model_config's keys, most of them MindFormers 1.9's for its own DeepSeek, and what to write instead.
ELSEWHERE = (
    {
        key: f"here it is {name}"
        for key, name in {
            "apply_rope_fusion": "use_fused_rope",
            "bias_swiglu_fusion": "use_fused_swiglu",
            "layernorm_compute_dtype": "layernorm_compute_type",
            "moe_aux_loss_coeff": "moe_config.aux_loss_factors",
            "moe_grouped_gemm": "moe_config.use_gmm",
            "moe_router_bias_update_rate": "moe_config.topk_bias_update_rate",
            "moe_router_enable_expert_bias": "moe_config.balance_via_topk_bias",
            "moe_router_fusion": "moe_config.use_fused_ops_topkrouter",
            "moe_router_load_balancing_type": "moe_config.aux_loss_types",
            "moe_shared_expert_intermediate_size": "moe_config.shared_expert_num, in widths of moe_intermediate_size",
            "moe_token_dispatcher_type": "moe_config.moe_token_dispatcher_type",
            "moe_token_drop_policy": "moe_config.enable_sdrop, without use_gmm",
            "mtp_loss_scaling_factor": "mtp_loss_factor",
            "n_routed_experts": "moe_config.expert_num",
            "n_shared_experts": "moe_config.shared_expert_num",
            "num_attention_heads": "num_heads",
            "num_experts_per_tok": "moe_config.num_experts_chosen",
            "num_hidden_layers": "num_layers",
            "num_nextn_predict_layers": "mtp_depth",
            "params_dtype": "param_init_type",
            "position_embedding_type": "extend_method: YARN, or none",
            "rope_theta": "theta",
            "scoring_func": "moe_config.use_gating_sigmoid",
            "softmax_compute_dtype": "softmax_compute_type",
        }.items()
    }
    | {key: f"here it is scaling_factor.{key}" for key in ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}
    | {
        key: f"here it is moe_config.{key}"
        for key in ("n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "first_k_dense_replace")
        + ("moe_intermediate_size", "use_fused_ops_topkrouter")
    }
    | dict.fromkeys(("architectures", "model_type"), "leave it out: type says which model it is")
    | dict.fromkeys(
        ("add_bias_linear", "attention_dropout", "gated_linear_unit", "hidden_act", "hidden_dropout")
        + ("multi_latent_attention", "qk_layernorm"),
        "leave it out: DeepSeek's models have latent attention with norms, SiLU gates, no biases and no dropout",
    )
    | dict.fromkeys(
        ("mla_qkv_concat", "use_attn_mask_compression", "use_fused_mla", "use_pad_tokens"),
        "leave it out: it chooses among MindFormers' own layers",
    )
    | {"use_eod_attn_mask_compression": "leave it out: data_loader.config.create_compressed_eod_mask says it"}
    | dict.fromkeys(("block_size", "num_blocks"), f"leave it out: {NO_CACHE}")
)
EVEN = "must be even: rotary positions turn pairs"


@dataclass(kw_only=True)
class YarnConfig:
    """Parameters of YaRN (arXiv 2309.00071), as in HuggingFace's `rope_scaling`; defaults are DeepSeek-V3's."""

    factor: Annotated[float, Meta(ge=1)] = 40.0  # context extension factor
    original_max_position_embeddings: Positive = 4096  # context length of pretraining
    beta_fast: PositiveNumber = 32.0  # rotations above which a dimension is left alone
    beta_slow: PositiveNumber = 1.0  # rotations below which a dimension is interpolated
    mscale: NotNegativeNumber = 1.0  # temperature of cos/sin
    mscale_all_dim: NotNegativeNumber = 1.0  # temperature of the softmax scale


ATTENTION_TARGETS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
FFN_TARGETS = ("gate_proj", "up_proj", "down_proj")
FFN_PLACES = {"mlp": r"mlp", "shared_experts": r"mlp\.shared_experts", "experts": r"mlp\.experts\.\d+"}


@dataclass(kw_only=True)
class LoraConfig:
    """The `pet_config` of model_config: LoRA adapters (lora.py). Without a rank the model has none.

    target_modules are the leaves of HuggingFace's module names; of FFNs also with their place: `mlp.up_proj` is the
    dense layers', `shared_experts.up_proj` and `experts.up_proj` the shared and the routed experts', `up_proj` all.
    """

    lora_rank: NotNegative = 0
    lora_alpha: PositiveNumber = 32.0  # adapters are multiplied by lora_alpha / lora_rank
    lora_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0  # of the adapters' input
    target_modules: list[str] = field(default_factory=list)

    def __post_init__(self):
        name, rank = f"{MODEL}.pet_config", self.lora_rank
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

    def adapts_experts(self) -> bool:
        """True when a matrix of the routed experts has adapters."""
        return any(self.has(f"experts.{part}") for part in FFN_TARGETS)


@dataclass(kw_only=True)
class MoeConfig:
    """The `moe_config` section. Expert counts are per layer."""

    # Keys that MindFormers' moe_config does not know
    own: ClassVar = ("shared_expert_split", "moe_token_dispatcher_type", "dropless_rows", "dropless_row_factor")

    expert_num: Positive = 1  # HF n_routed_experts; 1 = a dense model
    num_experts_chosen: Positive = 1  # HF num_experts_per_tok, K
    shared_expert_num: NotNegative = 0  # HF n_shared_experts
    # What model_parallel splits of them: their width, or the tokens (weights whole, nothing sent)
    shared_expert_split: Literal["width", "tokens"] = "tokens"
    moe_intermediate_size: Positive = 1407  # width of one expert
    first_k_dense_replace: NotNegative = 0  # leading layers with a dense FFN
    # router
    routing_policy: Literal["TopkRouterV2"] = "TopkRouterV2"
    use_gating_sigmoid: bool = False  # sigmoid scores (V3) or softmax (V2); HF scoring_func
    topk_method: Literal["greedy", "group_limited_greedy", "noaux_tc"] = "greedy"
    n_group: Positive | None = None  # expert groups for group-limited selection
    topk_group: Positive | None = None  # groups a token may use
    norm_topk_prob: bool = False  # gates normalised to sum 1 before scaling
    routed_scaling_factor: PositiveNumber = 1.0  # gates multiplied by this, after normalising
    use_fused_ops_topkrouter: bool = False  # CPU only: no Ascend operator of MindSpore 2.9 selects as DeepSeek does
    # balancing
    balance_via_topk_bias: bool = False  # the callback updates the selection bias each step
    topk_bias_update_rate: NotNegativeNumber = 0.0  # gamma of the update
    aux_loss_types: list[Literal["expert", "device", "comm"]] | None = None  # expert is sequence-wise
    aux_loss_factors: list[NotNegativeNumber] | None = None  # one alpha per type
    aux_loss_factor: NotNegativeNumber = 0.05  # alpha of every type when aux_loss_factors is not given
    z_loss_factor: NotNegativeNumber = 0.0  # times mean(logsumexp(logits)^2)
    # dispatch
    use_gmm: bool = False  # True: dropless, sorted tokens, grouped matmul; False: capacity
    # Dropless, where experts are split
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "alltoall_deredundency"] = "allgather"
    npu_nums_per_device: Positive = 8  # devices of a node, between which alltoall_deredundency sends each choice
    # Rows of allgather's buffers: those there are, all there could be, or dropless_row_factor times the balanced ones,
    # whose overflow is dropped, counted and reported.
    dropless_rows: Literal["exact", "worst_case", "bounded"] = "exact"
    dropless_row_factor: Annotated[float, Meta(ge=1)] = 1.5
    use_fused_ops_permute: bool = False  # fused token permute/unpermute where the device has it
    capacity_factor: PositiveNumber = 1.1  # capacity = ceil(K * group tokens * factor / experts), capped at the group
    expert_group_size: Positive | None = None  # tokens of a sequence over which capacity is counted; None = all
    enable_sdrop: bool = False  # overflow drops the last tokens (True) or the lowest-ranked choices (False)
    group_wise_a2a: bool = False  # all-to-all in two hops: inside the model-parallel group, then across
    expert_model_parallel: Annotated[
        int, Only(1, "experts are not split inside; split them over parallel_config.expert_parallel")
    ] = 1

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
        experts, chosen, groups = self.expert_num, self.num_experts_chosen, self.n_group
        rule = f"a token chooses at most expert_num = {experts} experts; nearest legal: {experts}"
        require(chosen <= experts, f"{MOE}.num_experts_chosen", chosen, rule)
        rule = f"must divide expert_num = {experts}; {divisors_near(groups, experts)}"
        require(experts % groups == 0, f"{MOE}.n_group", groups, rule)
        rule = f"a token can use at most n_group = {groups} groups; nearest legal: {groups}"
        require(self.topk_group <= groups, f"{MOE}.topk_group", self.topk_group, rule)
        eligible = experts // groups * self.topk_group
        rule = f"leaves {eligible} experts a token may use, fewer than num_experts_chosen = {chosen}"
        require(eligible >= chosen, f"{MOE}.topk_group", self.topk_group, rule)

    def _check_dispatch(self) -> None:
        kind, sorted_rows = self.moe_token_dispatcher_type, self.use_gmm and self.use_fused_ops_permute
        rule = "needs use_gmm and use_fused_ops_permute: True; capacity dispatch exchanges tokens without it"
        require(kind == "allgather" or sorted_rows, f"{MOE}.moe_token_dispatcher_type", kind, rule)
        rule = "is of moe_token_dispatcher_type 'allgather': the buffers of an all-to-all hold the rows there are"
        require(kind == "allgather" or self.dropless_rows == "exact", f"{MOE}.dropless_rows", self.dropless_rows, rule)

    def _check_balance(self) -> None:
        rule = f"needs one number for each of aux_loss_types = {self.aux_loss_types}"
        fits = len(self.aux_loss_factors) == len(self.aux_loss_types)
        require(fits, f"{MOE}.aux_loss_factors", self.aux_loss_factors, rule)
        require(
            not self.balance_via_topk_bias or self.topk_method == "noaux_tc",
            f"{MOE}.balance_via_topk_bias",
            True,
            f"needs topk_method 'noaux_tc', which has a bias; topk_method is {self.topk_method!r}",
        )


@dataclass(kw_only=True)
class ModelConfig:
    """A DeepSeek-V2 model (V2, V2-Lite, Coder-V2-Lite), without what only its run decides.

    Raises:
        ConfigError: values that cannot work together, in one sentence.
    """

    model_type: ClassVar[str] = "deepseekv2"
    elsewhere: ClassVar[dict[str, str]] = ELSEWHERE
    assumed_moe: ClassVar[dict[str, Any]] = {}  # of `moe_config`, where the YAML does not say

    # sizes
    batch_size: Positive = 1
    seq_length: Positive = 4096  # tokens of a training sample
    hidden_size: Positive = 2048
    num_layers: Positive = 27
    num_heads: Positive = 16
    n_kv_heads: Positive | None = None  # MLA has as many as num_heads
    max_position_embeddings: Positive | None = None  # default seq_length
    intermediate_size: Positive | None = 10944  # dense FFN; None: 8/3 of hidden_size, rounded up to multiple_of
    multiple_of: Positive = 256
    vocab_size: Positive = 102400
    kv_lora_rank: Positive = 512
    q_lora_rank: Positive | None = None  # None: queries come from one projection (V2-Lite)
    qk_rope_head_dim: Positive = 64
    qk_nope_head_dim: Positive = 128
    v_head_dim: Positive = 128
    tie_word_embeddings: bool = False  # embedding and head are one matrix
    # numerics
    rms_norm_eps: PositiveNumber = 1e-6
    initializer_range: PositiveNumber = 0.02
    compute_dtype: FloatType = "bfloat16"  # matmuls and the residual stream
    layernorm_compute_type: FloatType = "float32"
    softmax_compute_type: FloatType = "float32"
    rotary_dtype: FloatType = "float32"
    router_dense_type: FloatType = "float32"  # of the gate's matmul; scores are always float32
    param_init_type: FloatType = "float32"
    # tokens
    bos_token_id: NotNegative = 100000
    eos_token_id: NotNegative = 100001
    pad_token_id: NotNegative = 100001
    ignore_token_id: int = -100
    input_sliced_sig: bool = True  # True: samples carry shifted labels; False: input_ids has one token more
    # positions
    theta: Annotated[float, Meta(gt=1)] = 10000.0  # of 1 all pairs of a head would turn alike
    extend_method: Literal["None", "YARN"] | None = "None"
    scaling_factor: YarnConfig | None = None  # only with extend_method YARN
    # operators
    use_flash_attention: bool = False
    use_fused_rope: bool = False
    use_fused_swiglu: bool = False
    use_fused_rms_norm: bool = False
    use_fused_cross_entropy: bool = False  # CPU: head and loss in one operator that keeps no logits
    track_max_attention_logit: bool = False  # every layer keeps the largest logit of each head
    # run
    pp_interleave_num: Positive = 1  # chunks of layers in each pipeline stage
    offset: Offset = 0  # layers more (or fewer) than num_layers // pipeline_stage // pp_interleave_num, per stage
    return_extra_loss: bool = True  # add the balance losses to the loss
    use_past: Annotated[bool, Only(False, NO_CACHE)] = False
    checkpoint_name_or_path: str | None = ""
    pet_config: LoraConfig | None = None
    # multi-token prediction (V3 only: 0 here)
    mtp_depth: Annotated[int, Only(0, "only DeepSeek-V3 predicts further")] = 0
    mtp_loss_factor: NotNegativeNumber = 0.3  # lambda, of the mean over depths
    # text generation
    max_decode_length: Positive = 1024
    do_sample: bool = False
    top_k: NotNegative = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    temperature: PositiveNumber = 1.0
    # from its own section
    moe_config: MoeConfig = field(default_factory=MoeConfig)

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.num_heads
        self.max_position_embeddings = self.max_position_embeddings or self.seq_length
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 3 // self.multiple_of) * self.multiple_of
        self.extend_method = self.extend_method or "None"
        self.pet_config = self.pet_config or LoraConfig()
        self._check_sizes()
        self._check_gates()
        self._check_lora()

    @property
    def lora(self) -> LoraConfig:
        """The adapters; rank 0 without."""
        return self.pet_config

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def yarn(self) -> YarnConfig | None:
        """YaRN's parameters, or None when positions are not extended."""
        return None if self.extend_method == "None" else self.scaling_factor or YarnConfig()

    @property
    def has_indexer(self) -> bool:
        """True for attention over selected keys (V3.2)."""
        return self.model_type == "deepseekv32"

    @property
    def warms_up(self) -> bool:
        """True when nothing but the indexers is trained."""
        return self.has_indexer and self.sparse_attention == "warm_up"

    @property
    def layers_in_all(self) -> int:
        """Decoder layers, those of multi-token prediction included."""
        return self.num_layers + self.mtp_depth

    def is_moe_layer(self, layer: int) -> bool:
        """True when decoder layer `layer` (from 0, MTP's follow the last) has experts."""
        return self.moe_config.expert_num > 1 and layer >= self.moe_config.first_k_dense_replace

    def pipeline(self, stages: int, scheduler: str = "1f1b") -> Pipeline:
        """Where every decoder layer lies."""
        folded = scheduler == FOLDED
        return Pipeline(self.num_layers, self.mtp_depth, stages, self.pp_interleave_num, folded, self.offset)

    def _check_sizes(self) -> None:
        rule = f"MLA has one key/value head per query head: leave it out or set num_heads = {self.num_heads}"
        require(self.n_kv_heads == self.num_heads, f"{MODEL}.n_kv_heads", self.n_kv_heads, rule)
        require(self.qk_rope_head_dim % 2 == 0, f"{MODEL}.qk_rope_head_dim", self.qk_rope_head_dim, EVEN)
        rule = f"must not exceed max_position_embeddings = {self.max_position_embeddings}"
        require(self.seq_length <= self.max_position_embeddings, f"{MODEL}.seq_length", self.seq_length, rule)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value, rule = getattr(self, key), f"must be a token id below vocab_size = {self.vocab_size}"
            require(value < self.vocab_size, f"{MODEL}.{key}", value, rule)
        rule = f"a depth k predicts token k + 1 after each, so it must be below seq_length = {self.seq_length}"
        require(self.mtp_depth < self.seq_length, f"{MODEL}.mtp_depth", self.mtp_depth, rule)
        rule = "a fused norm computes in float32: leave the key out, or set use_fused_rms_norm: False"
        fits = self.layernorm_compute_type == "float32" or not self.use_fused_rms_norm
        require(fits, f"{MODEL}.layernorm_compute_type", self.layernorm_compute_type, rule)
        extends = self.extend_method == "YARN" or self.scaling_factor is None
        require(extends, f"{MODEL}.scaling_factor", self.scaling_factor, "only extend_method: YARN uses it")

    def _check_gates(self) -> None:
        """DeepSeek-V2's own modeling_deepseek.py normalises the gates of K > 1 or scales them; V3's does both."""
        moe = self.moe_config
        both = moe.norm_topk_prob and moe.routed_scaling_factor != 1 and moe.num_experts_chosen > 1
        rule = (
            "must be 1 with norm_topk_prob: True, because DeepSeek-V2's own code normalises gates or scales them, "
            "never both"
        )
        fits = self.model_type != "deepseekv2" or not both
        require(fits, f"{MOE}.routed_scaling_factor", moe.routed_scaling_factor, rule)

    def _check_lora(self) -> None:
        """Every target must exist: an adapter that is asked for and missing would go unnoticed."""
        moe, targets = self.moe_config, self.lora.target_modules
        dense = moe.expert_num == 1 or moe.first_k_dense_replace > 0
        routed = moe.expert_num > 1 and moe.first_k_dense_replace < self.num_layers
        places = {"mlp": dense, "shared_experts": routed and moe.shared_expert_num > 0, "experts": routed}
        absent = {"q_proj"} if self.q_lora_rank is not None else {"q_a_proj", "q_b_proj"}
        for target in targets:
            exists = places[target.split(".")[0]] if "." in target else target not in absent
            require(exists, f"{MODEL}.pet_config.target_modules", target, "this model has no such projection")
        rule = "must be 0 with pet_config: HuggingFace's models, for which adapters are saved, have no MTP layer"
        require(not targets or self.mtp_depth == 0, f"{MODEL}.mtp_depth", self.mtp_depth, rule)


@dataclass(kw_only=True)
class V3ModelConfig(ModelConfig):
    """A DeepSeek-V3 model: V2's keys with the values of the released 671B model, and multi-token prediction."""

    model_type: ClassVar[str] = "deepseekv3"
    # sigmoid scores, bias for balance, gates normalised
    assumed_moe: ClassVar[dict[str, Any]] = {
        "use_gating_sigmoid": True,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
    }

    hidden_size: Positive = 7168
    num_layers: Positive = 61
    num_heads: Positive = 128
    intermediate_size: Positive | None = 18432
    vocab_size: Positive = 129280
    q_lora_rank: Positive | None = 1536
    initializer_range: PositiveNumber = 0.006
    bos_token_id: NotNegative = 0
    eos_token_id: NotNegative = 1
    pad_token_id: NotNegative = 1
    mtp_depth: NotNegative = 1  # tokens predicted beyond the next one


@dataclass(kw_only=True)
class V32ModelConfig(V3ModelConfig):
    """A DeepSeek-V3.2 model: V3 whose queries attend only the keys that an indexer selects."""

    model_type: ClassVar[str] = "deepseekv32"

    index_n_heads: Positive = 64
    index_head_dim: Positive = 128
    index_topk: Positive = 2048  # keys that a query attends
    # warm_up: attention is dense and the indexer alone is trained; sparse: keys are selected, all is trained
    sparse_attention: Literal["warm_up", "sparse"] = "sparse"
    indexer_loss_factor: NotNegativeNumber = 1.0  # of the sum over layers

    def __post_init__(self):
        super().__post_init__()
        rule = "must be at least qk_rope_head_dim = {}: so much of an indexer's head is turned by position"
        fits = self.index_head_dim >= self.qk_rope_head_dim
        require(fits, f"{MODEL}.index_head_dim", self.index_head_dim, rule.format(self.qk_rope_head_dim))
        rule = "must be a number: the indexer's queries come from the latent of the queries"
        require(self.q_lora_rank is not None, f"{MODEL}.q_lora_rank", None, rule)
        rule = "must be False: the indexer learns from attention weights, which flash attention does not give"
        require(not self.use_flash_attention, f"{MODEL}.use_flash_attention", True, rule)
        rule = "the warm-up trains the indexer only: leave pet_config out, or set sparse_attention: sparse"
        fits = self.sparse_attention == "sparse" or not self.lora.lora_rank
        require(fits, f"{MODEL}.pet_config.lora_rank", self.lora.lora_rank, rule)


# The model classes by the `type` of model_config.
FAMILIES: dict[str, type[ModelConfig]] = {
    "DeepseekV2Config": ModelConfig,
    "DeepseekV3Config": V3ModelConfig,
    "DeepseekV32Config": V32ModelConfig,
}
