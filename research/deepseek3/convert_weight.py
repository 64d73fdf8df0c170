"""HuggingFace's DeepSeek V2 or V3 (V3.1, R1) to our checkpoint.

    python research/deepseek3/convert_weight.py --input HF_DIR --output DIR --dtype bf16 --workers 2

Writes model-00001-of-000NN.safetensors, model.safetensors.index.json and model.yaml (the sections model and
moe_config, for `base_config` of a run). FP8 is dequantised, router biases stay float32. After an interruption, run it
again: files that are done stay. --only-names checks the tensor list of HF_DIR's index and needs no weights.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from hf_config import read_config, sections_from_hf
from hf_weights import DTYPES, HuggingFaceWeights, audit_index, outputs

from mindformers_ext.errors import ConfigError, exit_code_of
from mindformers_ext.files.atomic import write_text
from mindformers_ext.files.safetensors_format import write_folder, written_before
from mindformers_ext.training.pretrained import fingerprint

PREFIX = "model"  # of the files of our checkpoints; unlike HuggingFace's there is no config.json beside them
CONFIG = "model.yaml"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, type=Path, help="HuggingFace folder: config.json and *.safetensors")
    parser.add_argument("--output", type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="type of the weights (default bf16)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads (default: cores)")
    parser.add_argument("--only-names", action="store_true", help="check the names of the index and stop")
    return parser


def convert(arguments: list[str] | None = None) -> None:
    """Parse, check everything, write, report."""
    args = build_parser().parse_args(arguments)
    if args.only_names:
        print(f"{args.input}: {audit_index(args.input)}")
        return
    if args.output is None or args.workers < 1:
        raise ConfigError("--output needs a folder, and --workers a number of at least 1")
    if args.output.resolve() == args.input.resolve():
        raise ConfigError(f"--output {args.output} is the input; give another folder")
    start = time.perf_counter()
    weights = HuggingFaceWeights(args.input)
    print(f"{args.input}: {weights.audit}", flush=True)
    source = f"{fingerprint(weights)} {args.dtype}"
    written_before(args.output, PREFIX)  # before anything is written
    sections = sections_from_hf(read_config(args.input), args.input / "config.json")
    sections["model"]["model_config"]["mtp_depth"] = weights.config.mtp_depth
    write_text(args.output / CONFIG, yaml.safe_dump(sections, sort_keys=False))
    done = write_folder(
        args.output, outputs(weights, DTYPES[args.dtype]), PREFIX, source, {"format": "np"}, args.workers
    )
    seconds = time.perf_counter() - start
    print(
        f"wrote {done.tensors:,} parameters, {done.bytes / 1e9:.2f} GB, to {done.files} files of {args.output} "
        f"({done.files_kept} were done before) in {seconds:.1f} s, {done.bytes / 1e9 / seconds:.2f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(exit_code_of(convert))
