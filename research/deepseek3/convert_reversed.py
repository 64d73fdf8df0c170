"""Our checkpoint to a HuggingFace folder that transformers and vLLM read.

    python research/deepseek3/convert_reversed.py --input DIR --output HF_DIR --hf_assets_path HF_DIR

--input is a folder of convert_weight.py, a checkpoint of a training run in any layout, or a HuggingFace folder.
config.json and the tokenizer's files come from --hf_assets_path (the original model's folder, or one made by
scripts/make_hf_assets.py); config.json is corrected to what the files hold. Interrupted runs go on when repeated.
"""

import argparse
import ast
import os
import shutil
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_config import config_from_hf, corrected, read_config
from hf_weights import BIAS, DTYPES, HF_INDEX, HuggingFaceWeights, cast, rows_of_piece
from lora import MergedWeights
from weights import Entry, boxes, name_table, write_part

from mindformers_ext.errors import ConfigError, exit_code_of
from mindformers_ext.files.atomic import whole_file, write_json
from mindformers_ext.files.json_files import read_object
from mindformers_ext.files.safetensors_format import Output, write_folder, written_before
from mindformers_ext.sharded_checkpoint.layout import is_state
from mindformers_ext.sharded_checkpoint.reader import Averaged, Checkpoint, Source, open_source
from mindformers_ext.sharded_checkpoint.shards import Slot
from mindformers_ext.training.pretrained import fingerprint, is_huggingface

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PREFIX = HF_INDEX.partition(".")[0]
ASSETS = (
    "tokenizer*",
    "tokenization_*.py",
    "*.tiktoken",
    "tiktoken.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="our checkpoint, or a HuggingFace folder")
    parser.add_argument("--output", required=True, type=Path, help="HuggingFace folder to write")
    parser.add_argument("--hf_assets_path", required=True, type=Path, help="folder of config.json and the tokenizer")
    parser.add_argument("--export_dtype", choices=DTYPES, default="bf16", help="type of the weights (default bf16)")
    parser.add_argument("--merge_lora", type=Path, help="folder of an adapter in PEFT's format, added to the weights")
    parser.add_argument("--averaged", action="store_true", help="the average of the weights (recipe.ema_decay)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads (default: cores)")
    return parser


def audit(entries: list[Entry], weights: Source, where: str | Path) -> int:
    """Check that the source has every parameter in its shape and no other layer; return how many tensors stay out.

    Raises:
        ConfigError: names the first parameter that is missing, unknown, of another shape, or a bias not finite.
    """
    names, wanted = set(weights.names()), {entry.ours for entry in entries}
    missing = [entry.ours for entry in entries if entry.ours not in names]
    if missing:
        raise ConfigError(f"{where}: parameter {missing[0]!r} (and {len(missing) - 1} more) is missing")
    rest = names - wanted
    unknown = sorted(n for n in rest if n.startswith(("model.", "mtp.", "lm_head.")) and is_state(n))
    if unknown:
        raise ConfigError(
            f"{where}: parameter {unknown[0]!r} (and {len(unknown) - 1} more) is not of the model that "
            "--hf_assets_path describes; give the config.json of this model"
        )
    for entry in entries:
        shape = tuple(weights.read(entry.ours).shape)
        if shape != entry.shape:
            raise ConfigError(
                f"{where}: {entry.ours} has shape {shape}, but config.json of --hf_assets_path needs {entry.shape}"
            )
        if entry.ours.endswith(BIAS) and not np.isfinite(weights.read(entry.ours)[:]).all():
            raise ConfigError(f"{where}: {entry.ours} has values that are not finite")
    return len(rest)


def outputs(entries: list[Entry], weights: Source, dtype: np.dtype) -> Iterable[Output]:
    """Every HuggingFace tensor in `dtype`, router biases in float32, to be written piece by piece."""
    for entry in entries:
        kind = np.dtype(np.float32) if entry.ours.endswith(BIAS) else dtype
        ours = weights.read(entry.ours)
        for name, box in boxes(entry, 0, entry.shape[0]):
            rows = rows_of_piece(entry.shape, kind) if entry.layout == "same" else 1
            pieces = [partial(piece, entry, ours, part, kind, name) for part in cut(box, rows)]
            for stored in (name, *entry.copies):
                yield Output(stored, entry.their_shape, kind, pieces)


def cut(box: tuple, rows: int) -> list[tuple]:
    """A box in parts of `rows` along the first axis."""
    start, stop = box[0]
    return [((row, min(row + rows, stop)), *box[1:]) for row in range(start, stop, rows)]


def piece(entry: Entry, ours, box: tuple, dtype: np.dtype, name: str) -> np.ndarray:
    """The part of a HuggingFace tensor that lies at `box` of ours."""
    return cast(write_part(entry, ours, box), dtype, name, ours)


def assets_of(folder: Path) -> list[Path]:
    """The tokenizer's files in a folder: the usual names, and the Python files of a tokenizer that brings its own."""
    files = {file for pattern in ASSETS for file in folder.glob(pattern) if file.is_file()}
    waiting = [file for file in files if file.suffix == ".py"] + modules_named(folder / "tokenizer_config.json")
    while waiting:
        file = waiting.pop()
        files.add(file)
        waiting += [other for other in imported(file) if other not in files]
    return sorted(files)


def modules_named(path: Path) -> list[Path]:
    """The Python files that the auto_map of a tokenizer_config.json names: `module.Class`, one or a list."""
    auto_map = read_object(path).get("auto_map") if path.is_file() else None
    values = list(auto_map.values()) if isinstance(auto_map, dict) else []
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    modules = [name.partition(".")[0] for name in names if isinstance(name, str)]  # `repository--module` lies elsewhere
    files = [path.with_name(f"{module}.py") for module in modules if module.isidentifier()]
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{path}: auto_map names {file.name}, which is not in the folder; copy it there")
    return files


def imported(file: Path) -> list[Path]:
    """The files beside a Python file that it imports (`from .x import y`), which transformers loads with it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (ValueError, SyntaxError):  # transformers will say so
        return []
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return [other for name in names if name and (other := file.with_name(f"{name.partition('.')[0]}.py")).is_file()]


def copy_assets(source: Path, output: Path) -> list[str]:
    """Copy the tokenizer's files; return their names."""
    files = assets_of(source)
    for file in files:
        if not (output / file.name).exists() or not file.samefile(output / file.name):
            with whole_file(output / file.name) as temporary:
                shutil.copyfile(file, temporary)
    return [file.name for file in files]


def convert(arguments: list[str] | None = None) -> None:
    """Parse, check everything, write, report."""
    args = build_parser().parse_args(arguments)
    if args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}, but must be at least 1")
    if args.output.resolve() == args.input.resolve():
        raise ConfigError(f"--output {args.output} is the input; give another folder")
    start = time.perf_counter()
    values = read_config(args.hf_assets_path)
    weights: Source = HuggingFaceWeights(args.input) if is_huggingface(args.input) else open_source(args.input)
    if args.averaged:
        if not isinstance(weights, Checkpoint):
            raise ConfigError(f"--averaged: {args.input} is no checkpoint of a training")
        weights = Averaged(weights.path)
    mtp_depth = len({name.split(".")[1] for name in weights.names() if name.startswith("mtp.")})
    entries = list(name_table(config_from_hf(values, mtp_depth, args.hf_assets_path / "config.json")))
    left_out = audit(entries, weights, args.input)
    if isinstance(weights, Checkpoint):  # the only source with checksums
        weights.verify({entry.ours: Slot.whole(entry.shape) for entry in entries})
    source = f"{fingerprint(weights)} {args.export_dtype}{' averaged' * args.averaged}"
    if args.merge_lora:
        weights = MergedWeights(weights, entries, args.merge_lora)
        source += fingerprint(weights.adapter)
    print(f"{args.input}: {len(entries):,} parameters used once each, {left_out:,} other tensors left out", flush=True)
    written_before(args.output, PREFIX)  # before anything is written
    config = corrected(values, mtp_depth, TORCH_NAMES[args.export_dtype])
    write_json(args.output / "config.json", config)
    copied = copy_assets(args.hf_assets_path, args.output)
    done = write_folder(
        args.output,
        outputs(entries, weights, DTYPES[args.export_dtype]),
        PREFIX,
        source,
        {"format": "pt"},
        args.workers,
    )
    seconds = time.perf_counter() - start
    print(
        f"wrote {done.tensors:,} tensors, {done.bytes / 1e9:.2f} GB, to {done.files} files of {args.output} "
        f"({done.files_kept} were done before) in {seconds:.1f} s; config.json with {mtp_depth} MTP layers; "
        f"copied {', '.join(copied) or 'no tokenizer files'}"
    )


if __name__ == "__main__":
    sys.exit(exit_code_of(convert))
