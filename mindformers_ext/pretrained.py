"""Read the weights of whole checkpoints part by part and load them into a network.

A source of weights gives parameters by name, as objects with `shape` that read what they are indexed with. Ours are
below; the model gives one for HuggingFace folders (`network.huggingface_weights(folder)`). MindFormers 1.9.0 loads a
whole file into memory first, and converts HuggingFace folders for its own models only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Tensor, nn
from mindspore.train import Callback, RunContext
from tqdm import tqdm

from mindformers_ext.errors import ConfigError
from mindformers_ext.safetensors_files import files_fingerprint
from mindformers_ext.sharded_checkpoint.reader import Readable, Source, open_source
from mindformers_ext.train_wrapper import real_model

CONVERTED_INDEX = "model.safetensors.index.json"  # written by research/deepseek3/convert_weight.py
COUNTERS = ("expert_load", "loss_parts")  # no state of a checkpoint


class Weights(Protocol):
    """A source of weights."""

    def read(self, name: str) -> Any:
        """The parameter `name`: an object with `shape` and indexing by slices, which reads."""

    def names(self) -> list[str]:
        """Every parameter the source has."""

    def fingerprint(self) -> str:
        """A text that changes when the source does."""


class CheckpointWeights:
    """Weights under our own names: a folder of convert_weight.py, or the newest file of a training run.

    Raises:
        ConfigError: nothing is there, or it is damaged.
    """

    def __init__(self, location: str | Path, where: str | Path = "checkpoint"):
        try:
            self.source = open_source(location)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def read(self, name: str) -> Readable:
        """A tensor by name."""
        return self.source.read(name)

    def names(self) -> list[str]:
        """Every tensor, the optimizer's too."""
        return list(self.source.names())

    def fingerprint(self) -> str:
        """Changes when one of the files does."""
        path = self.source.path
        return files_fingerprint(path.iterdir() if path.is_dir() else [path])


def is_huggingface(location: str | Path) -> bool:
    """True for a folder with a config.json and safetensors files."""
    folder = Path(location)
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A folder whose names only the network can translate; `where` is the YAML, for errors."""

    path: Path
    where: str | Path


def resolve(source: Source | HuggingFaceFolder, network: nn.Cell) -> Source:
    """The source of the network's parameters. Raises ConfigError when a folder is another model's."""
    return open_weights(network, source.path, source.where) if isinstance(source, HuggingFaceFolder) else source


def is_whole_folder(location: str | Path | None) -> bool:
    """True for a folder of HuggingFace or of convert_weight.py: weights of a whole model and nothing else."""
    return bool(location) and (is_huggingface(location) or (Path(location) / CONVERTED_INDEX).is_file())


def open_weights(network: nn.Cell, location: str | Path, where: str | Path) -> Weights:
    """The weights at a folder of HuggingFace or of convert_weight.py for this network.

    Raises:
        ConfigError: the folder is damaged or is another model's.
    """
    if not is_huggingface(location):
        return CheckpointWeights(location, where)
    if not hasattr(network, "huggingface_weights"):
        raise ConfigError(f"{where}: load_checkpoint {str(location)!r} is a HuggingFace folder of another model")
    return network.huggingface_weights(location)


def load_pretrained(network: nn.Cell, location: str | Path, where: str | Path) -> None:
    """Load every weight of `network` from a folder; nothing is loaded unless everything fits.

    Raises:
        ConfigError: names the parameter that is missing, unknown or of another shape.
    """
    weights = open_weights(network, location, where)
    parameters = check_fits(network, weights, f"{where}: load_checkpoint {str(location)!r}")
    for name, parameter in tqdm(parameters.items(), desc="load", unit="parameter"):
        value = np.ascontiguousarray(weights.read(name)[:].astype(np.float32))
        parameter.set_data(Tensor(value, parameter.dtype))
    logger.info("loaded %d parameters from %s", len(parameters), location)


def check_fits(network: nn.Cell, weights: Weights, where: str) -> dict[str, Any]:
    """The network's parameters by name, if the source has each of them in its shape and no layers beside them.

    Counters of training and LoRA adapters start anew; an MTP layer that the network does not have is left out.
    """
    parameters = {p.name: p for p in network.get_parameters() if not p.name.endswith((*COUNTERS, ".lora_a", ".lora_b"))}
    names = set(weights.names())
    missing = [name for name in parameters if name not in names]
    if missing:
        raise ConfigError(
            f"{where} lacks {len(missing)} of the model's weights, the first is {missing[0]!r}; give a checkpoint of "
            "this model"
        )
    unknown = sorted(name for name in names - set(parameters) if not name.startswith("mtp."))
    if unknown:
        raise ConfigError(f"{where} has {len(unknown)} weights that the model lacks, the first is {unknown[0]!r}")
    for name, parameter in parameters.items():
        shape, needed = tuple(weights.read(name).shape), tuple(parameter.shape)
        if shape != needed:
            raise ConfigError(f"{where}: {name} has shape {shape}, but this model needs {needed}")
    return parameters


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class PretrainedLoader(Callback):
    """Load a folder of weights when training begins. run_modes.py adds it; `where` is the YAML, for errors."""

    def __init__(self, location: str, where: str, load: Callable = load_pretrained):
        super().__init__()
        self.location, self.where, self.load = location, where, load

    def on_train_begin(self, run_context: RunContext) -> None:
        """Load before the first step."""
        self.load(real_model(run_context.original_args().train_network), self.location, self.where)
