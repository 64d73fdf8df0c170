"""Find and load the checkpoints that CheckpointMonitor writes, for the modes that need only the weights."""

import json
from pathlib import Path

import mindspore as ms
from mindspore import nn

from mindformers_ext.errors import ConfigError


def find_checkpoint(location: str | None, config_path: str | Path, name: str | None = None) -> Path:
    """Return the newest checkpoint at a file, a rank folder or a folder with rank_0/, or the one called `name`.

    Raises:
        ConfigError: nothing is there.
    """
    path = Path(location or "")
    if not location or not path.exists():
        raise ConfigError(
            f"{config_path}: load_checkpoint is {location!r}, which does not exist; give a checkpoint file or folder "
            "with --load_checkpoint"
        )
    if path.is_file():
        return path
    folder = path / "rank_0" if (path / "rank_0").is_dir() else path
    if name is not None:
        if not (folder / name).is_file():
            raise ConfigError(f"{config_path}: resume_training is {name!r}, but {folder} holds no such checkpoint file")
        return folder / name
    meta = folder / "meta.json"
    if meta.exists():
        newest = folder / json.loads(meta.read_text(encoding="utf-8"))["last_ckpt_file"]
        if newest.exists():
            return newest
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.ckpt")], key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(f"{config_path}: load_checkpoint is {location!r}, which holds no .safetensors or .ckpt file")
    return files[-1]


def single_file_folder(checkpoint: Path, output_dir: Path) -> Path:
    """Return a folder that holds nothing but a link to the checkpoint, under the name of a complete one.

    MindFormers 1.9.0 resumes one process only from a folder of complete weights, whose counters it reads from
    hyper_param.safetensors; it takes the folder rank_0/ that CheckpointMonitor writes for one of several processes.
    """
    folder = output_dir / "loaded_checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / f"hyper_param{checkpoint.suffix}"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.resolve())
    return folder


def load_weights(network: nn.Cell, checkpoint: Path, config_path: str | Path) -> None:
    """Load every weight of the network from a checkpoint; counters of training may be missing.

    Raises:
        ConfigError: the file cannot be read, or weights are missing or of another shape.
    """
    kind = "safetensors" if checkpoint.suffix == ".safetensors" else "ckpt"
    try:
        parameters = ms.load_checkpoint(str(checkpoint), format=kind)
        missing, _ = ms.load_param_into_net(network, parameters)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{config_path}: load_checkpoint {str(checkpoint)!r} does not fit this model: "
            f"{' '.join(str(error).split())}"
        ) from None
    lost = [name for name in missing if not name.endswith(("expert_load", "loss_parts"))]
    if lost:
        raise ConfigError(
            f"{config_path}: load_checkpoint {str(checkpoint)!r} lacks {len(lost)} of the model's weights, the first "
            f"is {lost[0]!r}; give a checkpoint of this model"
        )
