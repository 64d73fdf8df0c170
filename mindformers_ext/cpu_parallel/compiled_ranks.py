"""Compiled ranks that are kept for the next run: when they may be used again, and how that is known to be safe.

A lowered graph is code: it names libraries by their path, and a rank runs what stands there. So a folder of compiled
ranks is named by all that decides them, the libraries' contents included; it is used only while each graph has the
checksum that it had when it was compiled, and only where nobody else can write.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from mindformers_ext.collectives import collectives
from mindformers_ext.config.run import Run
from mindformers_ext.cpu_kernels import library
from mindformers_ext.errors import UserError
from mindformers_ext.files.atomic import write_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "compiled_ranks"  # of output_dir
# What a compiled graph does not depend on: sections of the YAML, and where a data loader takes its samples from.
OUTSIDE_THE_GRAPH = (
    *("run_mode", "output_dir", "load_checkpoint", "resume_training", "callbacks", "processor", "eval_dataset"),
    *("do_eval", "eval_step_interval", "use_graceful_exit", "max_train_hours", "max_step_minutes", "data_skip_steps"),
    "ignore_data_skip",
)
DATA_ONLY = (
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "split", "random_seed", "seed"),
    *("path_to_cache", "mmap_bin_files", "num_dataset_builder_threads"),
)
GRAPH_ROOMS = ("config", "layers", "cpu_kernels", "training", "rank_compiler", "lowering")  # what it does depend on
# MindSpore's own CPU operators, and the products that our kernels call.
MINDSPORE_LIBRARIES = ("plugin/libmindspore_ops_cpu.so*", "libmindspore_cpu.so*", "libnnacl.so*", "libdnnl.so*")
CHECKSUMS = "checksums.json"  # written when all ranks are compiled
RANK_FILES = ("cpu.mindir", "calls.json", "compiled.json")


def graph_key(plan: Run, model: Path = ROOT / "research/deepseek3") -> str:
    """Names everything that a compiled rank depends on; `model` is the folder of the model's files."""
    digest = hashlib.sha256(json.dumps(decisive(plan), sort_keys=True, default=str).encode())
    for package in ("mindspore", "mindformers"):
        digest.update(importlib.metadata.version(package).encode())
    for folder in (model, *(ROOT / "mindformers_ext" / room for room in GRAPH_ROOMS)):
        for source in sorted(folder.glob("*.py")):
            digest.update(source.read_bytes())
    for path in libraries():
        digest.update(f"{path} {checksum(path)}".encode())
    return digest.hexdigest()[:16]


def decisive(plan: Run) -> dict[str, Any]:
    """What of the YAML a graph depends on: not the samples; their number only where the learning rate asks for it."""
    config = json.loads(json.dumps({k: v for k, v in plan.values.items() if k not in OUTSIDE_THE_GRAPH}, default=str))
    loader = (config.get("train_dataset") or {}).get("data_loader") or {}
    for key in DATA_ONLY:
        loader.get("config", {}).pop(key, None)
    loader.pop("leave_out", None)
    sizes = loader.pop("sizes", None)
    if rate_needs_the_end(config):
        config["samples"] = sizes
    else:
        config.get("runner_config", {}).pop("epochs", None)
    return config


def rate_needs_the_end(config: dict[str, Any]) -> bool:
    """Whether the learning rate, which is part of the graph, follows from the number of all steps."""
    schedule = config.get("lr_schedule") or {}
    given = schedule.get("type") == "WarmupStableCosineStepsLR" or schedule.get("total_steps") not in (None, -1)
    return bool(config.get("grouped_lr_schedule")) or not given


def libraries() -> list[Path]:
    """What a compiled rank runs: our kernels for this kind of CPU, our collectives, and MindSpore's."""
    theirs = Path(importlib.util.find_spec("mindspore").origin).parent / "lib"
    found = [path for pattern in MINDSPORE_LIBRARIES for path in sorted(theirs.glob(pattern))]
    return [library.library_path(), collectives.library_path(), *found]


def checksum(path: Path) -> str:
    """Of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def rank_files(folder: Path, world_size: int) -> dict[str, Path]:
    """{name: path} of all that ranks read from `folder`."""
    names = (f"rank_{rank}/{file}" for rank in range(world_size) for file in RANK_FILES)
    return {name: folder / name for name in names}


def seal(folder: Path, world_size: int) -> None:
    """Say that all ranks in `folder` are compiled, with the checksums of their files."""
    write_json(folder / CHECKSUMS, {name: checksum(path) for name, path in rank_files(folder, world_size).items()})


def is_sound(folder: Path, world_size: int) -> bool:
    """True when all ranks in `folder` are compiled and their files are what they were then."""
    try:
        sealed = json.loads((folder / CHECKSUMS).read_text())
        return sealed == {name: checksum(path) for name, path in rank_files(folder, world_size).items()}
    except (OSError, ValueError):
        return False


def private_folder(output_dir: Path, key: str) -> Path:
    """The folder of the ranks with this key, which only this user may write.

    Raises UserError when others may write there, or a rank's files.
    """
    folder = output_dir.resolve() / FOLDER / key
    folder.parent.parent.mkdir(parents=True, exist_ok=True)
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, exist_ok=True)
    for path in (folder.parent, folder, *folder.glob("rank_*"), *folder.glob("rank_*/*")):
        facts = path.stat()
        if facts.st_mode & 0o022 or facts.st_uid not in (0, os.getuid()):
            raise UserError(
                f"{path} can be written by other users, and ranks run what stands there: remove {folder.parent}, or "
                f"look through it and make it yours alone (chown -R, chmod -R go-w)"
            )
    return folder


@contextmanager
def only_mine() -> Iterator[None]:
    """What this process and its children create meanwhile, nobody else may read or write."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)
