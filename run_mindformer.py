"""MindFormers' command line for DeepSeek: train, finetune, eval or predict from one YAML.

    python run_mindformer.py --config research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml \
        --register_path research/deepseek3 --runner_config.epochs 2

Any key of the YAML can be set as `--section.key value`. Bad input ends with one sentence and exit code 2.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from mindformers_ext.errors import ConfigError, exit_code_of
from mindformers_ext.yaml_config import load_yaml, override

HERE = Path(__file__).resolve().parent


def parse_bool(text: str) -> bool:
    """True or False from a command line."""
    if text.lower() in ("true", "1"):
        return True
    if text.lower() in ("false", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def parse_bool_or_text(text: str) -> bool | str:
    """True, False, or the name of a saved step."""
    try:
        return parse_bool(text)
    except argparse.ArgumentTypeError:
        return text


# Option, YAML key it sets, type, help.
OPTIONS = (
    ("run_mode", "run_mode", str, "train, finetune, eval or predict"),
    ("use_parallel", "use_parallel", parse_bool, "run on several devices (started by scripts/msrun_launcher.sh)"),
    ("load_checkpoint", "load_checkpoint", str, "folder of checkpoints, of one step, or of safetensors files"),
    ("resume_training", "resume_training", parse_bool_or_text, "go on from load_checkpoint: True, or step_000100"),
    ("auto_trans_ckpt", "auto_trans_ckpt", parse_bool, "change the checkpoint's parallel layout while loading"),
    ("output_dir", "output_dir", str, "folder for checkpoints, metrics and logs"),
    ("seed", "seed", int, "random seed"),
    ("device_target", "context.device_target", str, "CPU or Ascend"),
    ("device_id", "context.device_id", int, "device of a single-device run"),
    ("mode", "context.mode", int, "0 graph mode, 1 PyNative mode"),
    ("epochs", "runner_config.epochs", int, "passes over train_dataset"),
    ("batch_size", "runner_config.batch_size", int, "samples per device and micro-batch"),
    ("gradient_accumulation_steps", "runner_config.gradient_accumulation_steps", int, "micro-batches per step"),
    ("sink_mode", "runner_config.sink_mode", parse_bool, "feed data from the device side"),
)


def build_parser() -> argparse.ArgumentParser:
    """The options that have a name of their own; everything else is --section.key value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--register_path", default="research/deepseek3", help="folder of the model's Python files")
    parser.add_argument("--predict_data", nargs="+", help="one or more texts to continue (run_mode predict)")
    for name, _, kind, text in OPTIONS:
        parser.add_argument(f"--{name}", type=kind, help=text)
    return parser


def parse_overrides(rest: list[str]) -> list[tuple[str, Any]]:
    """Turn the remaining `--section.key value` or `--section.key=value` arguments into pairs, values read as YAML."""
    pairs, position = [], 0
    while position < len(rest):
        key, equals, text = rest[position].partition("=")
        if not key.startswith("--"):
            raise ConfigError(f"argument {rest[position]!r} is not understood; options look like --section.key value")
        if not equals:
            position += 1
            if position == len(rest):
                raise ConfigError(f"option {key} has no value; write {key} VALUE")
            text = rest[position]
        position += 1
        pairs.append((key[2:], yaml.safe_load(text)))
    return pairs


def all_overrides(options: argparse.Namespace, rest: list[str]) -> list[tuple[str, Any]]:
    """Every key of the YAML that the command line sets."""
    named = [(key, getattr(options, name)) for name, key, *_ in OPTIONS if getattr(options, name) is not None]
    return parse_overrides(rest) + named


def find(path: str) -> Path:
    """A path as given, or relative to the folder of this script."""
    return Path(path) if Path(path).exists() else HERE / path


def prepare_environment(register_path: str, output_dir: str) -> None:
    """Let MindFormers find the model's files, put its logs into output_dir, and keep MindSpore's warnings back."""
    os.environ["REGISTER_PATH"] = str(find(register_path).resolve())
    os.environ.setdefault("LOG_MF_PATH", str(Path(output_dir) / "log"))
    os.environ.setdefault("OM_MODULES_CACHE", str(Path(output_dir) / "log" / "modules"))  # auto_register's own copy
    os.environ.setdefault("GLOG_v", "3")
    if os.environ["REGISTER_PATH"] not in sys.path:
        sys.path.insert(0, os.environ["REGISTER_PATH"])


def run(arguments: list[str]) -> None:
    """Parse the command line, check the YAML and run its mode."""
    options, rest = build_parser().parse_known_args(arguments)
    path = find(options.config)
    config = load_yaml(path)
    for key, value in all_overrides(options, rest):
        override(config, key, value, path)
    prepare_environment(options.register_path, config.get("output_dir", "./output"))
    logging.disable(logging.WARNING)  # MindFormers tells of optional packages that are missing
    from mindformers_ext.run_modes import run_mode  # after the environment, which MindFormers reads while importing

    logging.disable(logging.NOTSET)
    run_mode(config, path, options.predict_data)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: run(sys.argv[1:])))
