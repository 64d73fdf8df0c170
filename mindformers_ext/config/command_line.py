"""run_mindformer.py's command line: its options, and every key of the YAML as `--section.key value`."""

import argparse
from pathlib import Path
from typing import Any

from mindformers_ext.config.yaml_files import parse_value
from mindformers_ext.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


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


def parse_text(text: str) -> str | None:
    """A text as it stands; null and ~ are YAML's words for none."""
    return None if text in ("null", "~") else text


# Option, YAML key it sets, type, help.
OPTIONS = (
    ("run_mode", "run_mode", parse_text, "train, finetune, eval, predict, score or compile"),
    ("use_parallel", "use_parallel", parse_bool, "run on several devices (started by scripts/msrun_launcher.sh)"),
    ("load_checkpoint", "load_checkpoint", parse_text, "folder of checkpoints, of one step, or of safetensors files"),
    ("resume_training", "resume_training", parse_bool_or_text, "go on from load_checkpoint: True, or step_000100"),
    ("output_dir", "output_dir", parse_text, "folder for checkpoints, metrics and logs"),
    ("seed", "seed", int, "random seed"),
    ("device_target", "context.device_target", parse_text, "CPU or Ascend"),
    ("device_id", "context.device_id", int, "device of a single-device run"),
    ("mode", "context.mode", int, "0 graph mode, 1 PyNative mode"),
    ("epochs", "runner_config.epochs", int, "passes over train_dataset"),
    ("batch_size", "runner_config.batch_size", int, "samples per device and micro-batch"),
    ("gradient_accumulation_steps", "runner_config.gradient_accumulation_steps", int, "micro-batches per step"),
    ("sink_mode", "runner_config.sink_mode", parse_bool, "feed data from the device side"),
)


def build_parser(description: str = "") -> argparse.ArgumentParser:
    """The options that have a name of their own; everything else is --section.key value."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file")
    parser.add_argument("--register_path", default="research/deepseek3", help="folder of the model's Python files")
    parser.add_argument("--predict_data", nargs="+", help="one or more texts to continue (run_mode predict)")
    for name, _, kind, text in OPTIONS:
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
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
        pairs.append((key[2:], parse_value(text, key)))
    return pairs


def all_overrides(options: argparse.Namespace, rest: list[str]) -> list[tuple[str, Any]]:
    """Every key of the YAML that the command line sets."""
    named = [(key, getattr(options, name)) for name, key, *_ in OPTIONS if hasattr(options, name)]
    return parse_overrides(rest) + named


def find(path: str) -> Path:
    """A path as given, or relative to the project."""
    return Path(path) if Path(path).exists() else ROOT / path
