"""Read a LoRA adapter as peft 0.17.1 writes it: every option is done as peft does it, or refused by name."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.finite import all_finite
from mindformers_ext.files.json_files import Positive, PositiveNumber, check_keys, read_object, short
from mindformers_ext.files.safetensors_format import StoredTensor, read_header

__all__ = ["ADAPTER_CONFIG", "ADAPTER_FILE", "PEFT_PREFIX", "PeftFolder"]

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
PEFT_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
FLOATS = ("float32", "float16", "bfloat16")
Names = list[str] | str | None
# What decides where adapters are and what they are multiplied with.
KNOWN = {
    "r": Positive,
    "lora_alpha": PositiveNumber,
    "use_rslora": bool,
    "rank_pattern": dict[str, Positive] | None,
    "alpha_pattern": dict[str, PositiveNumber] | None,
    "target_modules": Names,
    "exclude_modules": Names,
    "layers_to_transform": list[int] | int | None,
    "layers_pattern": Names,
    "init_lora_weights": bool | str | None,
    "peft_type": Literal["LORA"],
}
# Options that change the arithmetic and that merging here does not know: only "off" passes.
REFUSED = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "bias",
    "modules_to_save",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "ensure_weight_tying",
    "alora_invocation_tokens",
    "arrow_config",
)
OFF = (None, False, [], {}, "none")
# What training used, or what an option above that is off would need.
NO_EFFECT = (
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "peft_version",
)
# The others (pissa, olora, corda, loftq) take a part of the base's weights away, or round them, before training begins.
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


class PeftFolder:
    """The adapter in a PEFT folder: lora_A, lora_B and what their product is multiplied with, by HuggingFace module.

    Raises:
        ConfigError: not an adapter of LoRA, one half missing, values that are not finite, or an option that is not
            known here.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self.settings = self._read_settings()
        file = self.path / ADAPTER_FILE
        if not file.is_file():
            raise ConfigError(f"{file} is missing; give the folder that training wrote")
        self.modules = self._read_modules(file)

    def _read_settings(self) -> dict[str, Any]:
        path = self.path / ADAPTER_CONFIG
        settings = read_object(path)
        for key in REFUSED:
            if settings.get(key) not in OFF:
                raise ConfigError(f"{path}: {key} is {short(settings[key])}, which merging does not support")
        known = check_keys(settings, KNOWN, (*NO_EFFECT, *REFUSED), f"{path}: not the configuration of a LoRA adapter")
        for key in ("r", "lora_alpha", "target_modules"):
            if known.get(key) in (None, [], ""):
                raise ConfigError(f"{path}: not the configuration of a LoRA adapter: {key} is missing")
        start = known.get("init_lora_weights")
        if start not in PLAIN_STARTS:
            raise ConfigError(
                f"{path}: init_lora_weights is {start!r}, which changes the base's weights before training; save the "
                "adapter as plain LoRA (peft's save_pretrained with path_initial_model_for_weight_conversion)"
            )
        patterns = [key for name in ("rank_pattern", "alpha_pattern") for key in known.get(name) or {}]
        patterns += [known[key] for key in ("target_modules", "exclude_modules") if isinstance(known.get(key), str)]
        for pattern in (*patterns, *listed(known.get("layers_pattern"))):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{path}: {pattern!r} is not a regular expression: {error}; correct it") from None
        return known

    def _read_modules(self, file: Path) -> dict[str, tuple[StoredTensor, StoredTensor, float]]:
        halves: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in read_header(file)[0].items():
            match = PEFT_NAME.fullmatch(name)
            if not match:
                hint = "; save it with save_embedding_layers=False" if name.endswith(".base_layer.weight") else ""
                raise ConfigError(f"{file}: {name!r} is not of a LoRA adapter{hint}")
            if tensor.dtype.name not in FLOATS:
                raise ConfigError(f"{file}: {name} is {tensor.dtype.name}, but must be one of {', '.join(FLOATS)}")
            if not all_finite(tensor[...]):
                raise ConfigError(f"{file}: {name} has values that are not finite; give another adapter")
            halves.setdefault(match[1], {})[match[2]] = tensor
        if not halves:
            raise ConfigError(f"{file}: holds no tensors; give the folder of a trained adapter")
        for module, pair in halves.items():
            rank, shapes = self.rank(module), {half: tensor.shape for half, tensor in pair.items()}
            fits = all(len(shape) == 2 for shape in shapes.values()) and len(pair) == 2
            if not fits or shapes["A"][0] != rank or shapes["B"][1] != rank:
                raise ConfigError(f"{self.path}: {module} has {shapes}, but needs A ({rank}, in) and B (out, {rank})")
            if not self.targets(module):
                raise ConfigError(
                    f"{file}: adapts {module}, but target_modules, exclude_modules and layers_to_transform of "
                    f"{ADAPTER_CONFIG} say that it has no adapter; correct them"
                )
        return {module: (pair["A"], pair["B"], self.scale(module)) for module, pair in halves.items()}

    def rank(self, module: str) -> int:
        """The rank of a module's adapter."""
        return by_pattern(self.settings.get("rank_pattern"), module, self.settings["r"])

    def scale(self, module: str) -> float:
        """What B A of a module is multiplied with."""
        alpha, rank = (
            by_pattern(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"]),
            self.rank(module),
        )
        return alpha / math.sqrt(rank) if self.settings.get("use_rslora") else alpha / rank

    def targets(self, module: str) -> bool:
        """True when the settings give a module an adapter."""
        targets, excluded = self.settings["target_modules"], self.settings.get("exclude_modules")
        if excluded and names_module(excluded, module):
            return False
        if targets == "all-linear":
            return module != "lm_head"
        if isinstance(targets, str) or module in targets:  # peft heeds layers_to_transform for endings only
            return names_module(targets, module)
        layers = self.settings.get("layers_to_transform")
        if not names_module(targets, module):
            return False
        return layers in (None, []) or self.layer(module) in ([layers] if isinstance(layers, int) else layers)

    def layer(self, module: str) -> int | None:
        """The number of the layer that a module is in, as layers_pattern finds it."""
        patterns = listed(self.settings.get("layers_pattern")) or [r"[^.]*"]
        found = (re.match(rf".*\.{pattern}\.(\d+)\.", module) for pattern in patterns)
        return next((int(match[1]) for match in found if match), None)

    def check_complete(self, modules: Iterable[str]) -> None:
        """Check that each of a model's projections has an adapter if the settings say so.

        Raises:
            ConfigError: names the first that has none.
        """
        lost = [module for module in modules if self.targets(module) and module not in self.modules]
        if lost:
            raise ConfigError(
                f"{self.path / ADAPTER_FILE}: target_modules of {ADAPTER_CONFIG} names {lost[0]} (and {len(lost) - 1} "
                "more), of which the file has no adapter; copy the folder again"
            )


def listed(names: Names) -> list[str]:
    """Names as a list."""
    return [names] if isinstance(names, str) and names else list(names or [])


def names_module(names: list[str] | str, module: str) -> bool:
    """True when a list has a module's name or its ending, or a regular expression matches it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
