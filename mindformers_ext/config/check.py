"""Check a run before anything is built, and say in one sentence each what is wrong.

What needs no MindSpore is checked by reading the run (run.py) and by the rules of strategy_rules.py; this file adds
what only the classes that the YAML names can tell, and what the machine that runs it decides.
"""

import inspect
import os
from collections.abc import Iterator
from typing import Any

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

from mindformers_ext.collectives.rank_job import WORLD_SIZE, is_cpu_rank
from mindformers_ext.config.run import Run
from mindformers_ext.config.run_rules import Violation, refuse
from mindformers_ext.config.strategy_rules import check_run
from mindformers_ext.config.typed import Other
from mindformers_ext.config.yaml_files import nearest
from mindformers_ext.errors import ConfigError, is_full_or_closed
from mindformers_ext.files.json_files import short

MODEL = "model.model_config"


def check_classes(run: Run) -> None:
    """Check the run on this machine: its rules, and the classes that it names.

    Raises:
        ConfigError: everything that cannot work.
    """
    started = os.getenv("MS_WORKER_NUM") or os.getenv("RANK_SIZE") or os.getenv(WORLD_SIZE)
    if (run.is_semi_auto or run.holds_whole_models) and started:
        run.device_num = int(started)
    refuse(run, [*check_run(run), *several_processes(run)])
    sentences = [sentence for section in other_classes(run) for sentence in check_class(*section)]
    if sentences:
        raise ConfigError(*(f"{run.path}: {sentence}" for sentence in sentences))
    check_model(run)


def several_processes(run: Run) -> Iterator[Violation]:
    """Ranks on CPU are processes that the launcher starts."""
    if run.is_semi_auto and run.on_cpu and not is_cpu_rank():
        yield Violation(
            "parallel.parallel_mode",
            "on CPU such a run has several processes: start it with scripts/msrun_launcher.sh, or set use_parallel "
            "False",
        )


def other_classes(run: Run) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(registry, section, its keys) of every section whose class is known by name only."""
    s = run.sections
    single = {
        "optimizer": ("optimizer", s.optimizer),
        "lr_schedule": ("lr", s.lr_schedule),
        "runner_wrapper": ("wrapper", s.runner_wrapper),
        "runner_wrapper.scale_sense": ("wrapper", getattr(s.runner_wrapper, "scale_sense", None)),
        "train_dataset.data_loader": ("dataset_loader", s.train_dataset and s.train_dataset.data_loader),
        "eval_dataset.data_loader": ("dataset_loader", s.eval_dataset and s.eval_dataset.data_loader),
    }
    for name, (registry, section) in single.items():
        if isinstance(section, Other):
            yield registry, name, section.settings
    for index, section in enumerate(s.callbacks):
        if isinstance(section, Other):
            yield "callback", f"callbacks[{index}]", section.settings


def check_class(registry: str, name: str, values: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a section whose `type` names a registered class: the class, and arguments it does not take."""
    kind = values["type"]
    registered = MindFormerRegister.registry.get(registry, {})
    if kind not in registered and "auto_register" in values:
        MindFormerRegister.auto_register(values["auto_register"], MindFormerModuleType(registry).value)
    if kind not in registered:
        yield f"{name}.type is {kind!r}, which is not registered; {nearest(kind, registered)}"
        return
    names, open_ended = constructor_keys(registered[kind])
    if open_ended and registry == "dataset_loader":
        return
    legal = names | {"type", "auto_register"}
    for key in values:
        if key not in legal:
            yield f"{name}.{key}: unknown key with value {short(values[key])}; {nearest(key, legal)}"


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


def check_model(run: Run) -> None:
    """Find the class of `model_config`; one that is not DeepSeek's is built, and so checks itself."""
    values = run.sections.model.model_config
    kind, reference = values.get("type"), values.get("auto_register")
    try:
        if reference:
            MindFormerRegister.auto_register(reference, MindFormerModuleType.CONFIG)
        cls = MindFormerRegister.get_cls(MindFormerModuleType.CONFIG, kind)
        if run.model is None:
            cls(**{key: value for key, value in values.items() if key not in ("type", "auto_register")})
    except (ImportError, OSError, AttributeError, ValueError, TypeError) as error:
        if is_full_or_closed(error):  # of the folder that the model's files are copied to
            raise
        raise ConfigError(
            f"{run.path}: {MODEL}.type is {kind!r} (auto_register {reference!r}), which cannot be built from "
            f"--register_path {os.getenv('REGISTER_PATH', '')!r}: {' '.join(str(error).split())}"
        ) from None
