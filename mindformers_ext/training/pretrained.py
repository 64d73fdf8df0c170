"""HuggingFace folders as sources of a network's parameters.

Only the model knows what HuggingFace calls its weights, so a folder is opened with the network, through its method
`huggingface_weights(folder)`. MindFormers 1.9.0 converts folders for its own models only.
"""

from dataclasses import dataclass
from pathlib import Path

from mindspore import nn

from mindformers_ext.errors import ConfigError
from mindformers_ext.files.safetensors_format import files_fingerprint
from mindformers_ext.sharded_checkpoint.reader import Source


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
    """The source of the network's parameters.

    Raises:
        ConfigError: a HuggingFace folder is damaged or another model's.
    """
    if not isinstance(source, HuggingFaceFolder):
        return source
    if not hasattr(network, "huggingface_weights"):
        raise ConfigError(
            f"{source.where}: load_checkpoint {str(source.path)!r} is a HuggingFace folder of another model"
        )
    return network.huggingface_weights(source.path)


def fingerprint(source: Source) -> str:
    """A text that changes when the files of a source do."""
    path = Path(source.path)
    return files_fingerprint((file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path])
