"""Write what a HuggingFace folder holds beside the weights, for a model that was trained from its own YAML.

    python scripts/make_hf_assets.py --config pretrain_deepseek3_tiny.yaml --tokenizer_file tokenizer.json \
        --output output/assets
    python scripts/make_hf_assets.py --hf_dir DeepSeek-V3 --output model.yaml     # the other way: a YAML's sections

The folder gets config.json, tokenizer.json, tokenizer_config.json with DeepSeek's chat template, and
generation_config.json; convert_reversed.py takes it as --hf_assets_path.
"""

import argparse
import shutil
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "research/deepseek3")]

from hf_config import (  # noqa: E402 (after the project is on the path)
    config_from_hf,
    config_to_hf,
    read_config,
    sections_from_hf,
)

from mindformers_ext.bin_dataset.chat_template import NEEDED  # noqa: E402
from mindformers_ext.config.model import FAMILIES, ModelConfig  # noqa: E402
from mindformers_ext.config.run import read_run  # noqa: E402
from mindformers_ext.errors import ConfigError, exit_code_of  # noqa: E402
from mindformers_ext.files.atomic import whole_file, write_json, write_text  # noqa: E402

BOS, EOS, USER, ASSISTANT = NEEDED
# As mindformers_ext/bin_dataset/chat_template.py renders conversations for training.
CHAT_TEMPLATE = (
    "{{ bos_token }}{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def model_of(path: Path) -> ModelConfig:
    """The model in a run's YAML."""
    model = read_run(path).model
    if model is None:
        raise ConfigError(f"{path}: model.model_config.type must be one of {', '.join(FAMILIES)}")
    return model


def write_assets(config: ModelConfig, tokenizer_file: Path, folder: Path) -> None:
    """Write the folder."""
    with whole_file(folder / "tokenizer.json") as temporary:
        shutil.copyfile(tokenizer_file, temporary)
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer)
    generation = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", config_to_hf(config, config.mtp_depth))


def run(arguments: list[str] | None = None) -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML of a run")
    parser.add_argument("--tokenizer_file", type=Path, help="tokenizer.json of the run")
    parser.add_argument("--hf_dir", type=Path, help="HuggingFace folder to read instead")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, a YAML file with --hf_dir")
    args = parser.parse_args(arguments)
    if args.hf_dir:
        values, where = read_config(args.hf_dir), args.hf_dir / "config.json"
        config_from_hf(values, 0, where)  # what does not go together is refused before it is written
        sections = sections_from_hf(values, where)
        write_text(args.output, yaml.safe_dump(sections, sort_keys=False))
    elif args.config and args.tokenizer_file:
        if not args.tokenizer_file.is_file():
            raise ConfigError(f"--tokenizer_file {args.tokenizer_file} does not exist")
        write_assets(model_of(args.config), args.tokenizer_file, args.output)
    else:
        raise ConfigError("give --config and --tokenizer_file, or --hf_dir")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    sys.exit(exit_code_of(run))
