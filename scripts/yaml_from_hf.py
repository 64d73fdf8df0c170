"""A complete YAML to fine-tune a HuggingFace model, from its config.json, for a number of cards.

    python scripts/yaml_from_hf.py --hf_dir DeepSeek-V3.1 --output finetune.yaml --device_num 128 --lora 16

The recipe is that of research/deepseek3/deepseek3_671b/finetune_deepseek3_671b.yaml; the layout is the fastest that the
dry run's estimate fits into the cards. config.json alone is enough; where weights are, their MTP layers are counted.
Then: python scripts/dryrun.py --config finetune.yaml --ranks none
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "research/deepseek3")]

from hf_config import config_from_hf, read_config, sections_from_hf  # noqa: E402 (after the project is on the path)

from mindformers_ext.config.run import Run, read_run  # noqa: E402
from mindformers_ext.config.run_rules import refuse  # noqa: E402
from mindformers_ext.config.strategy_rules import check_plan  # noqa: E402
from mindformers_ext.config.yaml_files import load_yaml, override  # noqa: E402
from mindformers_ext.dryrun.cost_model import estimate  # noqa: E402
from mindformers_ext.dryrun.device_profile import DEFAULT_PROFILE, DeviceProfile, load_profile  # noqa: E402
from mindformers_ext.dryrun.report import memory_limit  # noqa: E402
from mindformers_ext.dryrun.sweep import sweep  # noqa: E402
from mindformers_ext.errors import ConfigError, exit_code_of  # noqa: E402
from mindformers_ext.files.atomic import write_text  # noqa: E402

RECIPE = ROOT / "research/deepseek3/deepseek3_671b/finetune_deepseek3_671b.yaml"
ADAPTED = ROOT / "research/deepseek3/deepseek3_671b/finetune_deepseek3_671b_lora.yaml"
GIB = 2**30
# Of the recipe's model: how it is computed. What it is comes from config.json.
COMPUTED = (
    *("ignore_token_id", "compute_dtype", "layernorm_compute_type", "softmax_compute_type", "rotary_dtype"),
    *("router_dense_type", "param_init_type", "use_flash_attention", "use_fused_rope", "use_fused_swiglu"),
    *("use_fused_rms_norm", "input_sliced_sig", "return_extra_loss", "mtp_loss_factor"),
)
OF_EXPERTS = (
    *("routing_policy", "aux_loss_types", "aux_loss_factors", "use_fused_ops_permute", "use_fused_ops_topkrouter"),
)


def recipe(hf_dir: Path, seq_length: int | None, data: str, lora: int) -> dict[str, Any]:
    """The YAML's sections but for its layout. Raises ConfigError for a config.json that is no DeepSeek's."""
    hf = read_config(hf_dir)
    sections = sections_from_hf(hf, hf_dir / "config.json")
    values, adapted = load_yaml(RECIPE), load_yaml(ADAPTED)
    given, experts = values["model"]["model_config"], values["moe_config"]
    model = sections["model"]["model_config"] | {key: given[key] for key in COMPUTED}
    longest = config_from_hf(hf, 0, hf_dir / "config.json").max_position_embeddings
    length = seq_length or min(4096, longest)
    model |= {"seq_length": length, "max_position_embeddings": max(longest, length), "offset": 0}
    if seq_length and seq_length > longest:
        raise ConfigError(
            f"--seq_length {seq_length} is above {longest}, max_position_embeddings of {hf_dir}/config.json"
        )
    moe = sections["moe_config"]
    if moe["expert_num"] > 1:
        moe |= {key: experts[key] for key in OF_EXPERTS} | {"balance_via_topk_bias": False}
    if any(hf_dir.glob("*.safetensors*")):
        model["mtp_depth"] = depth_of_files(hf_dir, hf)
    sections["model"]["model_config"] = model
    values |= sections | {"load_checkpoint": str(hf_dir)}
    values["train_dataset"]["data_loader"]["config"] |= {"seq_length": length, "data_path": ["1", data]}
    values["recompute_config"]["recompute"] = True
    if lora:
        model |= {"mtp_depth": 0, "param_init_type": "bfloat16"}
        model["pet_config"] = adapted["model"]["model_config"]["pet_config"] | {
            "lora_rank": lora,
            "lora_alpha": 2 * lora,
        }
        targets = model["pet_config"]["target_modules"]
        model["pet_config"]["target_modules"] = [name for name in targets if exists(name, model, moe)]
        if model["q_lora_rank"] is None:
            model["pet_config"]["target_modules"].insert(0, "q_proj")
        values["lr_schedule"] |= adapted["lr_schedule"]
        values["callbacks"] = adapted["callbacks"]
        values["callbacks"][1]["base_model"] = str(hf_dir)
    return values


def exists(target: str, model: dict[str, Any], moe: dict[str, Any]) -> bool:
    """True when the model has such a matrix."""
    if target in ("q_proj", "q_a_proj", "q_b_proj"):
        return (target == "q_proj") == (model["q_lora_rank"] is None)
    if target.startswith("mlp."):
        return moe["expert_num"] == 1 or moe["first_k_dense_replace"] > 0
    return not target.startswith("shared_experts.") or moe["shared_expert_num"] > 0


def depth_of_files(hf_dir: Path, hf: dict[str, Any]) -> int:
    """MTP layers of the weights that are there, or that the index says will be."""
    from hf_weights import HF_INDEX, as_text, mtp_depth_of

    from mindformers_ext.files.safetensors_format import read_folder, read_index

    index = hf_dir / HF_INDEX
    names = read_index(index) if index.exists() else read_folder(hf_dir, HF_INDEX)
    return mtp_depth_of(as_text(names, hf_dir), hf["num_hidden_layers"])


def powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to a limit."""
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def laid_out(values: dict[str, Any], device_num: int, global_batch: int, profile: DeviceProfile, path: Path) -> Run:
    """The run with the fastest layout that fits; the one that needs least memory where none does.

    Raises ConfigError when no layout of so many devices is legal.
    """
    split = device_num > 1
    values["use_parallel"] = split
    values["parallel_config"] |= {"data_parallel": device_num, "model_parallel": 1, "pipeline_stage": 1}
    values["parallel_config"] |= {"expert_parallel": 1, "micro_batch_num": 1, "context_parallel": 1}
    values["runner_config"]["gradient_accumulation_steps"] = max(global_batch // device_num, 1)
    columns = len(values["train_dataset"]["input_columns"])
    values["parallel"]["dataset_strategy"] = [[device_num, 1]] * columns
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / path.name
        start.write_text(yaml.dump(values, Dumper=yaml.SafeDumper, sort_keys=False))
        layers, experts = values["model"]["model_config"]["num_layers"], values["moe_config"]["expert_num"]
        axes = {
            "parallel_config.model_parallel": powers(min(8, device_num)),
            "parallel_config.pipeline_stage": powers(min(layers, device_num, 32)),
            "parallel_config.expert_parallel": powers(min(experts, device_num, 32))[-3:],
        }
        legal, illegal = sweep(
            str(start), device_num, [("runner_config.gradient_accumulation_steps", 1)], axes, profile
        )
        if not legal:
            raise ConfigError(f"--device_num {device_num}: no layout is legal, for example {illegal[0]}")
        best = legal[0] if legal[0].fits else min(legal, key=lambda c: c.cost.memory_bytes)
        for key, value in best.overrides:
            override(values, key, value, path)
    micro = max(
        global_batch // (values["parallel_config"]["data_parallel"]), values["parallel_config"]["pipeline_stage"]
    )
    pipeline = values["parallel_config"]["pipeline_stage"] > 1
    values["parallel_config"]["micro_batch_num"] = micro if pipeline else 1
    values["runner_config"]["gradient_accumulation_steps"] = 1 if pipeline else micro
    return Run.of(values, path, device_num)


def main(argv: list[str] | None = None) -> None:
    """Parse, choose a layout, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf_dir", required=True, type=Path, help="folder with config.json")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--device_num", type=int, default=8, help="cards")
    parser.add_argument("--seq_length", type=int, help="tokens of a sample; default 4096, or what the model knows")
    parser.add_argument("--global_batch", type=int, default=128, help="samples of a step")
    parser.add_argument("--data", default="./dataset/instruct_text_document", help="prefix of the .bin/.idx pair")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0 trains all weights")
    args = parser.parse_args(argv)
    for name in ("device_num", "global_batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}, but must be at least 1")
    profile = load_profile(DEFAULT_PROFILE)
    values = recipe(args.hf_dir, args.seq_length, args.data, args.lora)
    run = laid_out(values, args.device_num, args.global_batch, profile, args.output)
    refuse(run, check_plan(run))
    head = f"# Fine-tune {args.hf_dir} on {args.device_num} cards, written by scripts/yaml_from_hf.py.\n"
    write_text(
        args.output,
        head + yaml.dump(values, Dumper=yaml.SafeDumper, sort_keys=False, default_flow_style=None, width=120),
    )
    cost, limit = estimate(read_run(args.output), profile), memory_limit(run, profile)
    print(f"wrote {args.output}: dp{run.dp} mp{run.mp} pp{run.pp} ep{run.ep}, {run.global_batch} samples a step")
    print(
        f"estimated: {cost.memory_bytes / GIB:.1f} GiB of {limit / GIB:.0f} on the fullest card, "
        f"{cost.step_seconds:.2f} s a step"
        + ("" if cost.memory_bytes <= limit else "; it does not fit: give more cards, or --lora")
    )


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
