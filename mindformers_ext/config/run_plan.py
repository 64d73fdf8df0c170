"""What a run's YAML asks for, as plain numbers: model, degrees, batch, recomputation and optimizer sharding.

Imports neither MindSpore nor MindFormers, so that a YAML is checked in a fraction of a second. Defaults are not
repeated here: they are read from the source of the model's own configuration classes.
"""

import ast
import functools
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mindformers_ext.config.yaml_files import load_yaml, lookup, override, refuse_unknown, short
from mindformers_ext.errors import ConfigError

DEGREES = (
    "data_parallel",
    "context_parallel",
    "model_parallel",
    "pipeline_stage",
    "expert_parallel",
    "micro_batch_num",
)
MODEL_SIZES = (
    "num_layers",
    "num_heads",
    "hidden_size",
    "vocab_size",
    "seq_length",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class ModelPlan:
    """The model's configuration as attributes, named and derived as in `deepseek2_config.DeepseekV2Config`."""

    def __init__(self, values: dict[str, Any], moe: dict[str, Any]):
        self.__dict__.update(values)
        self.pet_config = values["pet_config"] or {}
        self.moe_config = SimpleNamespace(**moe)
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 3 // self.multiple_of) * self.multiple_of
        self.moe_config.n_group = self.moe_config.n_group or 1

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def layers_in_all(self) -> int:
        """Decoder layers, those of multi-token prediction included."""
        return self.num_layers + self.mtp_depth

    def is_moe_layer(self, layer: int) -> bool:
        """True when decoder layer `layer` (from 0, MTP's follow the last) has experts."""
        return self.moe_config.expert_num > 1 and layer >= self.moe_config.first_k_dense_replace


@dataclass
class RunPlan:
    """Everything the instant check and the cost model need from one YAML."""

    path: str
    device_num: int
    model: ModelPlan
    dp: int
    cp: int
    mp: int
    pp: int
    ep: int
    micro_batches: int
    batch_size: int  # sequences per data-parallel rank and micro-batch
    sequence_parallel: bool
    vocab_emb_dp: bool
    recompute: bool | list[int]
    select_recompute: bool | list[int]
    shard_optimizer: bool
    optimizer_shard_size: int  # -1: all replicas
    shard_gradients: bool  # gradient accumulation buffers are split like the optimizer states
    optimizer_threshold_bytes: int  # smaller parameters are not split
    dataset_strategy: list | None
    config: dict = field(repr=False)  # the whole YAML with its overrides

    @property
    def devices_per_stage(self) -> int:
        """dp * cp * mp."""
        return self.dp * self.cp * self.mp

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step."""
        return self.batch_size * self.dp * self.micro_batches

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.global_batch * self.model.seq_length

    @property
    def layers_per_stage(self) -> list[int]:
        """Decoder layers of each stage, without MTP's, which lie on the last."""
        offset = self.model.offset
        if isinstance(offset, list):
            return [self.model.num_layers // self.pp + more for more in offset]
        base, rest = divmod(self.model.num_layers, self.pp)
        return [base + (stage >= self.pp - rest) for stage in range(self.pp)]

    def layers_of(self, stage: int) -> list[int]:
        """Decoder layers of `stage`; layer num_layers and above are MTP's."""
        counts = self.layers_per_stage
        first = sum(counts[:stage])
        layers = list(range(first, first + counts[stage]))
        if stage == self.pp - 1:
            layers += range(self.model.num_layers, self.model.layers_in_all)
        return layers

    def stage_of(self, rank: int) -> int:
        """Pipeline stage of a global rank: stages are blocks of consecutive ranks."""
        return rank // self.devices_per_stage


def load_plan(path: str | Path, device_num: int | None = None, overrides: list[tuple[str, Any]] = ()) -> RunPlan:
    """Read a YAML with `--section.key value` overrides; `device_num` None means dp * cp * mp * pp.

    Raises:
        ConfigError: unreadable YAML, or a value of the wrong kind.
    """
    config = load_yaml(path)
    for key, value in overrides:
        override(config, key, value, path)
    return make_plan(config, path, device_num)


def make_plan(config: dict, path: str | Path, device_num: int | None = None) -> RunPlan:
    """`load_plan` for a configuration already in memory."""
    parallel = _section(config, "parallel_config", mindformers_defaults("ParallelConfig"), path)
    recompute = _section(config, "recompute_config", mindformers_defaults("RecomputeConfig"), path)
    _check_kinds(config, path)
    dp, cp, mp, pp, ep, micro = (_whole(parallel[key], f"parallel_config.{key}", path, 1) for key in DEGREES)
    shard = lookup(config, "parallel.parallel_optimizer_config", {})
    accumulation = lookup(config, "runner_config.gradient_accumulation_steps", 1)
    return RunPlan(
        path=str(path),
        device_num=dp * cp * mp * pp if device_num is None else device_num,
        model=_model_plan(config, path),
        dp=dp,
        cp=cp,
        mp=mp,
        pp=pp,
        ep=ep,
        micro_batches=micro if pp > 1 else accumulation,
        batch_size=_whole(lookup(config, "runner_config.batch_size", 1), "runner_config.batch_size", path, 1),
        sequence_parallel=parallel["use_seq_parallel"],
        vocab_emb_dp=parallel["vocab_emb_dp"] and pp == 1,  # MindFormers resets it with a pipeline
        recompute=recompute["recompute"],
        select_recompute=recompute["select_recompute"],
        shard_optimizer=lookup(config, "parallel.enable_parallel_optimizer", False),
        optimizer_shard_size=shard.get("optimizer_weight_shard_size", -1),
        shard_gradients=shard.get("gradient_accumulation_shard", False),
        optimizer_threshold_bytes=shard.get("parallel_optimizer_threshold", 64) * 1024,
        dataset_strategy=lookup(config, "parallel.dataset_strategy"),
        config=config,
    )


def _model_plan(config: dict, path: str | Path) -> ModelPlan:
    given = lookup(config, "model.model_config")
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: model.model_config is missing; it names the model and its sizes")
    folder = model_folder()
    module, name = str(given.get("auto_register", "")).rpartition(".")[::2]
    if not (folder / f"{module}.py").is_file():
        raise ConfigError(
            f"{path}: model.model_config.auto_register is {given.get('auto_register')!r}, but must name a class in "
            f"{folder}, for example deepseek3_config.DeepseekV3Config"
        )
    defaults = class_defaults(folder, module, name)
    moe = class_defaults(folder, "deepseek2_config", "MoeConfig") | defaults.pop("default_moe_config", {})
    beside = dict.fromkeys(("type", "auto_register", "pet_config"))  # keys that are no field of the class
    values = _section(config, "model.model_config", defaults | beside, path)
    moe = _section(config, "moe_config", moe, path)
    for key in MODEL_SIZES:
        _whole(values[key], f"model.model_config.{key}", path, 1)
    for key in ("expert_num", "num_experts_chosen", "moe_intermediate_size"):
        _whole(moe[key], f"moe_config.{key}", path, 1)
    return ModelPlan(values, moe)


def model_folder() -> Path:
    """Folder of the model's Python files."""
    return Path(__file__).resolve().parents[2] / "research" / "deepseek3"


@functools.cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def _section(config: dict, name: str, defaults: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """A section over its defaults, which hold all its legal keys. Raises ConfigError for a key beside them."""
    given = lookup(config, name, {})
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: {name} is {short(given)}, but must be a mapping of keys")
    refuse_unknown(name, given, defaults, path)
    return defaults | given


def mindformers_defaults(name: str) -> dict[str, Any]:
    """The defaults of a section that has no class of ours, from MindFormers' own template."""
    (package,) = importlib.util.find_spec("mindformers").submodule_search_locations
    return class_defaults(Path(package) / "tools" / "register", "template", name)


def class_defaults(folder: Path, module: str, name: str) -> dict[str, Any]:
    """Fields of a configuration class and its bases with their defaults (None where there is none), and what its
    `default_moe_config` returns, read from the source because importing it would import MindSpore."""
    tree = _parse(folder / f"{module}.py")
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if found is None:
        return {}
    homes = {a.name: n.module for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    values: dict[str, Any] = {}
    for base in found.bases:
        if isinstance(base, ast.Name) and (folder / f"{homes.get(base.id)}.py").is_file():
            values |= class_defaults(folder, homes[base.id], base.id)
    for node in found.body:
        if isinstance(node, ast.AnnAssign):
            values[node.target.id] = node.value and ast.literal_eval(node.value)
        if isinstance(node, ast.Assign) and not node.targets[0].id.startswith("_"):
            values[node.targets[0].id] = ast.literal_eval(node.value)
        if isinstance(node, ast.FunctionDef) and node.name == "default_moe_config":
            values[node.name] = ast.literal_eval(node.body[-1].value)
    return values


def _check_kinds(config: dict, path: str | Path) -> None:
    """Refuse values that the arithmetic cannot use; the run itself checks all the others (config_check.py)."""
    for says, (holds, keys) in KINDS.items():
        for key in keys:
            value = lookup(config, key)
            if value is not None and not holds(value):
                raise ConfigError(f"{path}: {key} is {short(value)}, but must be {says}")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_layers(value: Any) -> bool:
    return isinstance(value, bool) or isinstance(value, list) and all(isinstance(n, int) for n in value)


# What a value must be: {sentence: (test, keys)}.
KINDS = {
    "True or False": (
        lambda v: isinstance(v, bool),
        (
            "parallel_config.use_seq_parallel",
            "parallel_config.vocab_emb_dp",
            "parallel.enable_parallel_optimizer",
            "parallel.parallel_optimizer_config.gradient_accumulation_shard",
            "model.model_config.use_flash_attention",
            "moe_config.use_gmm",
        ),
    ),
    "True, False, or a list with a number of layers per pipeline stage": (
        _is_layers,
        ("recompute_config.recompute", "recompute_config.select_recompute"),
    ),
    "0, or a list with a number of layers per pipeline stage": (
        lambda v: v == 0 and not isinstance(v, bool) or isinstance(v, list) and _is_layers(v),
        ("model.model_config.offset",),
    ),
    f"one of {', '.join(DTYPE_BYTES)}": (
        lambda v: v in DTYPE_BYTES,
        ("model.model_config.compute_dtype", "model.model_config.param_init_type"),
    ),
    "a whole number of at least 0": (
        lambda v: _is_whole(v, 0),
        (
            "model.model_config.mtp_depth",
            "moe_config.shared_expert_num",
            "moe_config.first_k_dense_replace",
            "parallel.parallel_optimizer_config.parallel_optimizer_threshold",
        ),
    ),
    "a whole number of at least 1": (
        lambda v: _is_whole(v, 1),
        (
            "model.model_config.q_lora_rank",
            "model.model_config.intermediate_size",
            "runner_config.gradient_accumulation_steps",
        ),
    ),
    "a number above 0": (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v > 0,
        ("moe_config.capacity_factor",),
    ),
    "a name, or a list of a list of whole numbers per input": (
        lambda v: (
            isinstance(v, str)
            or isinstance(v, list)
            and all(isinstance(axes, list) and axes and all(_is_whole(n, 1) for n in axes) for axes in v)
        ),
        ("parallel.dataset_strategy",),
    ),
    "a whole number of at least 1, or -1 for all copies of a weight": (
        lambda v: _is_whole(v, 1) or v == -1,
        ("parallel.parallel_optimizer_config.optimizer_weight_shard_size",),
    ),
}


def _whole(value: Any, key: str, path: str | Path, least: int) -> int:
    if not _is_whole(value, least):
        raise ConfigError(f"{path}: {key} is {value!r}, but must be a whole number of at least {least}")
    return value
