"""Check a YAML before anything is built, and say in one sentence what is wrong.

Every error is a ConfigError that names the file, the key, its value and what to do.
"""

import inspect
import os
from pathlib import Path
from typing import Any

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ext.collectives.rank_job import WORLD_SIZE, is_cpu_rank
from mindformers_ext.config.run_plan import make_plan
from mindformers_ext.config.schema import ANY, CLASS_SECTIONS, SECTIONS, Rule
from mindformers_ext.config.strategy_rules import refuse_illegal
from mindformers_ext.config.yaml_files import is_semi_auto, lookup, nearest, refuse_unknown, short
from mindformers_ext.errors import ConfigError


def check_config(config: dict, path: str | Path) -> None:
    """Check keys, values and the rules that join sections. Needs the classes named by the YAML to be importable.

    Raises:
        ConfigError: the first thing that cannot work.
    """
    for section in SECTIONS:
        values = lookup(config, section)
        if values is None:
            continue
        if section.endswith("data_loader.config") and not is_megatron(config, section.split(".")[0]):
            continue
        check_section(values, section, SECTIONS[section], path)
    for section in CLASS_SECTIONS:
        values = lookup(config, section)
        for index, item in enumerate(values if isinstance(values, list) else [values]):
            if isinstance(item, dict):
                check_class_section(item, section + (f"[{index}]" if isinstance(values, list) else ""), section, path)
    check_mode(config, path)
    model_config = check_model(config, path)
    check_degrees(config, path)
    check_cpu_types(config, model_config, path)


def is_megatron(config: dict, dataset: str) -> bool:
    """True when the dataset section reads Megatron .bin/.idx files."""
    return lookup(config, f"{dataset}.data_loader.type") == "BlendedMegatronDatasetDataLoader"


def check_section(values: Any, section: str, rules: dict[str, Rule], path: str | Path) -> None:
    """Check that `values` is a mapping of legal keys whose values satisfy their rules."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {section} is {values!r}, but must be a mapping of keys")
    refuse_unknown(section, values, rules, path)
    for key, value in values.items():
        name = f"{section}.{key}" if section else str(key)
        if not rules[key].holds(value):
            raise ConfigError(f"{path}: {name} is {short(value)}, but must be {rules[key].says}")


def check_class_section(values: dict, name: str, section: str, path: str | Path) -> None:
    """Check a section whose `type` names a registered class: the class exists and takes these arguments."""
    module_type, rules = CLASS_SECTIONS[section]
    kind = values.get("type")
    registered = MindFormerRegister.registry.get(module_type, {})
    if not isinstance(kind, str):
        raise ConfigError(f"{path}: {name}.type is {kind!r}, but must name a registered {module_type} class")
    if kind not in registered and "auto_register" in values:
        MindFormerRegister.auto_register(values["auto_register"], MindFormerModuleType(module_type).value)
    if kind not in registered:
        raise ConfigError(f"{path}: {name}.type is {kind!r}, which is not registered; {nearest(kind, registered)}")
    names, open_ended = constructor_keys(registered[kind])
    if open_ended and module_type == "dataset_loader" and kind != "BlendedMegatronDatasetDataLoader":
        return
    check_section(values, name, {key: rules.get(key, ANY) for key in names | set(rules)}, path)


def constructor_keys(cls: type) -> tuple[set[str], bool]:
    """Names of the arguments that a class and its parents construct from, and whether it takes any others."""
    names, open_ended = set(), False
    for base in cls.__mro__:
        for method in ("__init__", "__new__"):
            function = base.__dict__.get(method)
            if function is None or base is object:
                continue
            try:
                parameters = inspect.signature(inspect.unwrap(getattr(function, "__func__", function))).parameters
            except (TypeError, ValueError):
                continue
            open_ended |= any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            names |= {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return names - {"self", "cls"}, open_ended


def check_model(config: dict, path: str | Path) -> Any:
    """Build the model's configuration object, which checks `model_config` and `moe_config` itself, and return it."""
    values = lookup(config, "model.model_config")
    if values is None:
        raise ConfigError(f"{path}: model.model_config is missing; it names the model and its sizes")
    kind, reference = values.get("type"), values.get("auto_register")
    try:
        if reference:
            MindFormerRegister.auto_register(reference, MindFormerModuleType.CONFIG)
        cls = MindFormerRegister.get_cls(MindFormerModuleType.CONFIG, kind)
    except (ImportError, OSError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path}: model.model_config.type is {kind!r} (auto_register {reference!r}), which cannot be found in "
            f"--register_path {os.getenv('REGISTER_PATH', '')!r}: {' '.join(str(error).split())}"
        ) from None
    parts = {key: dict(config[key]) for key in ("moe_config", "parallel_config") if isinstance(config.get(key), dict)}
    parts["parallel_config"] = one_device_degrees(config, parts.get("parallel_config", {}))
    sizes = {key: value for key, value in values.items() if key not in ("type", "auto_register")}
    try:
        return cls(**sizes, **parts)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def check_cpu_types(config: dict, model_config: Any, path: str | Path) -> None:
    """Refuse what CPU cannot compute: MindSpore multiplies float32 only there, our kernels also bfloat16."""
    if lookup(config, "context.device_target", "Ascend") != "CPU":
        return
    for key in ("softmax_compute_type", "layernorm_compute_type", "router_dense_type"):
        value = getattr(model_config, key, "float32")
        if value != "float32":
            raise ConfigError(f"{path}: model.model_config.{key} is {value!r}, but on CPU it must be 'float32'")
    compute, moe = getattr(model_config, "compute_dtype", "float32"), getattr(model_config, "moe_config", None)
    in_kernels = moe is not None and (moe.expert_num == 1 or (moe.use_gmm and moe.use_fused_ops_permute))
    if compute != "float32" and not (compute == "bfloat16" and in_kernels):
        raise ConfigError(
            f"{path}: model.model_config.compute_dtype is {compute!r}, but on CPU it must be 'float32', or 'bfloat16' "
            "with moe_config.use_gmm and moe_config.use_fused_ops_permute True"
        )


def one_device_degrees(config: dict, degrees: dict) -> dict:
    """The parallel degrees that the model will see: all 1 unless the graph is split over devices."""
    if is_semi_auto(config):
        return degrees
    return {key: value for key, value in degrees.items() if key in ("vocab_emb_dp", "gradient_aggregation_group")}


def need(holds: bool, config: dict, key: str, rule: str, path: str | Path) -> None:
    """Raise ConfigError that names a key of the configuration, its value and the rule, unless `holds`."""
    if not holds:
        raise ConfigError(f"{path}: {key} is {short(lookup(config, key))}, but {rule}")


SEARCHED = "MindSpore 2.9 does not search strategies beside those of sharding.py ('Init tensor_layout failed')"
BY_HAND = "the model splits nothing by hand, which that mode is for"
OTHER_MODES = {2: SEARCHED, "auto_parallel": SEARCHED, 3: BY_HAND, "hybrid_parallel": BY_HAND}


def check_mode(config: dict, path: str | Path) -> None:
    """Refuse the parallel modes that this model has no use for."""
    mode = lookup(config, "parallel.parallel_mode")
    usable = not config.get("use_parallel") or mode not in OTHER_MODES
    rule = f"{OTHER_MODES.get(mode)}; use 1 (semi-auto) or 0 (data parallel)"
    need(usable, config, "parallel.parallel_mode", rule, path)


def check_degrees(config: dict, path: str | Path) -> None:
    """Check the rules that join the model, the data and the device; and the parallel degrees where they are used."""
    seq_length = lookup(config, "model.model_config.seq_length")
    for dataset in ("train_dataset", "eval_dataset"):
        key = f"{dataset}.data_loader.config.seq_length"
        if is_megatron(config, dataset) and seq_length is not None:
            same = lookup(config, key) == seq_length
            need(same, config, key, f"must equal model.model_config.seq_length {seq_length}", path)
    if not is_semi_auto(config):
        return
    on_cpu = lookup(config, "context.device_target", "Ascend") == "CPU"
    rule = "on CPU such a run has several processes: start it with scripts/msrun_launcher.sh, or set use_parallel False"
    need(not on_cpu or is_cpu_rank(), config, "parallel.parallel_mode", rule, path)
    started = os.getenv("MS_WORKER_NUM") or os.getenv("RANK_SIZE") or os.getenv(WORLD_SIZE)
    refuse_illegal(make_plan(config, path, int(started) if started else None))
