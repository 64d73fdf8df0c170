"""Pretrain DeepSeek-V3 with the environment variables of Gaudi's Megatron-LM (examples/deepseek/pretrain_deepseek.sh).

    HL_NUM_NODES=1 HL_DP=8 HL_TP=1 HL_PP=1 HL_EP=8 HL_GBS=8 HL_NUM_LAYERS=4 HL_DATA_DIR_ROOT=/data \
        HL_DATA_FILE_PREFIX=train_text_document bash scripts/pretrain_deepseek.sh --dry_run

Prints the YAML key that each variable becomes, checks the plan, and starts scripts/msrun_launcher.sh; --dry_run ends
after the check. Without --config the 671B YAML is underneath, and variables that are not set have the values of Gaudi's
script; with --config Y they leave that YAML alone. `--section.key value` has the last word. An HL_ variable without a
counterpart is named with the reason; an unknown one is refused.
"""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mindformers_ext.cluster import nodes
from mindformers_ext.config.command_line import ROOT, find
from mindformers_ext.config.run_rules import refuse
from mindformers_ext.config.strategy_rules import check_plan
from mindformers_ext.config.yaml_files import load_yaml, nearest
from mindformers_ext.cpu_parallel.command import read_plan
from mindformers_ext.errors import ConfigError, exit_code_of

BASE = "research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml"
DATA = "train_dataset.data_loader.config"
MODEL = "model.model_config"
# What Gaudi's script takes where a variable is not set (release 1.24).
GAUDI = {
    "HL_NUM_NODES": "1",
    "HL_DEVICES_PER_NODE": "8",
    "HL_DP": "2",
    "HL_TP": "2",
    "HL_PP": "2",
    "HL_EP": "2",
    "HL_SEQ_PARALLEL": "1",
    "HL_MICRO_BATCH": "1",
    "HL_GBS": "3072",
    "HL_SEQ_LEN": "4096",
    "HL_NUM_LAYERS": "61",
    "HL_TRAIN_ITERS": "500000",
    "HL_CKP_ACT": "0",
    "HL_TOKEN_DROP": "0",
    "HL_MOE_SKIP_FIRST_LAYERS": "3",
    "HL_SAVE_INTERVAL": "2000",
    "HL_LOG_INTERVAL": "10",
}
OTHER_NAMES = {
    "HL_MBS": "HL_MICRO_BATCH",
    "HL_KILL_SWITCH": "HL_KILL_SWITCH_FILE",
    "HL_FIRST_PP_STAGE_LAYERS": "HL_FISRT_PP_STAGE_LAYERS",
}
# Variables that are one number, switch or text in one or more keys.
NUMBERS = {
    "HL_DP": ("parallel_config.data_parallel",),
    "HL_TP": ("parallel_config.model_parallel",),
    "HL_PP": ("parallel_config.pipeline_stage",),
    "HL_EP": ("parallel_config.expert_parallel",),
    "HL_MICRO_BATCH": ("runner_config.batch_size",),
    "HL_SEQ_LEN": (f"{MODEL}.seq_length", f"{MODEL}.max_position_embeddings", f"{DATA}.seq_length"),
    "HL_NUM_LAYERS": (f"{MODEL}.num_layers",),
    "HL_NUM_WORKERS": ("train_dataset.num_parallel_workers",),
    "HL_PROFILE_STEP_START": ("profile_start_step",),
    "HL_PROFILE_STEP_END": ("profile_stop_step",),
}
SWITCHES = {
    "HL_SEQ_PARALLEL": "parallel_config.use_seq_parallel",
    "HL_USE_DISTRIBUTED_OPTIMIZER": "parallel.enable_parallel_optimizer",
    "HL_USE_FUSED_SDPA": f"{MODEL}.use_flash_attention",
    "HL_USE_FUSED_RMSNORM": f"{MODEL}.use_fused_rms_norm",
    "HL_DETERMINISTIC_MODE": "train_precision_sync",
}
TEXTS = {"HL_RESULTS_DIR": "output_dir", "HL_DATA_CACHE_DIR": f"{DATA}.path_to_cache"}
# Variables of the machines, which the launcher's arguments take the place of.
MACHINES = ("HL_NUM_NODES", "HL_DEVICES_PER_NODE", "HL_TORCHRUN_NODE_RANK", "HL_TORCHRUN_MASTER_ADDR")
# Variables whose value changes nothing here, and why.
WITHOUT_EFFECT = (
    dict.fromkeys(
        ("HL_LAUNCHER_TYPE", "HL_TORCHRUN_MULTINODE", "HL_HOSTSFILE", "HL_SSH_PORT", "HL_PE", "HL_PPR"),
        "msrun starts the ranks; start this script on every machine, or by Slurm or Kubernetes (docs/cluster.md)",
    )
    | dict.fromkeys(
        ("HL_HNIC", "HL_HCCL_OVER_OFI", "HL_HCCL_GAUDI_DIRECT", "HL_FI_PROVIDER", "HL_USE_LAZY_MODE")
        + ("HL_USE_TORCH_COMPILE", "HL_USE_TORCH_COMPILED_AUTOGRAD", "HL_USE_FAST_SOFTMAX", "HL_TRANSFORMER_IMPL")
        + ("HL_USE_FUSED_SDPA_WITH_RECOMPUTE", "HL_OPTIMIZER"),
        "it chooses among Gaudi's own",
    )
    | dict.fromkeys(
        ("HL_ENABLE_PARAM_GATHER_OVERLAP", "HL_ENABLE_GRAD_REDUCE_OVERLAP", "HL_ENABLE_SHARED_EXPERT_OVERLAP"),
        "MindSpore's compiler overlaps; see context.ascend_config.parallel_speed_up_json_path",
    )
    | dict.fromkeys(("HL_EVAL_ITERS", "HL_EVAL_INTERVAL"), "training evaluates nothing; use --run_mode eval")
    | dict.fromkeys(
        ("HL_CKPT_FORMAT", "HL_USE_DIST_CKPT", "HL_DIST_CKPT_FORMAT", "HL_VERIFY_CKPT")
        + ("HL_SAVE_DISTRIB_OPTIMIZER_METHOD", "HL_LOAD_DISTRIB_OPTIMIZER_METHOD"),
        "checkpoints are this project's own, by rank and checksummed",
    )
    | dict.fromkeys(("HL_TOKENIZER_TYPE", "HL_TOKENIZER_MODEL"), "training on .bin files reads no tokenizer")
    | dict.fromkeys(("HL_RESULTS_DIR_PREFIX", "HL_REDIRECT_LOGS"), "logs and results are in HL_RESULTS_DIR")
    | {"HL_PROFILE_RANKS": "set profile_rank_ids"}
)
KNOWN = {*GAUDI, *OTHER_NAMES, *NUMBERS, *SWITCHES, *TEXTS, *MACHINES, *WITHOUT_EFFECT} | {
    *("HL_RECOMPUTE_NUM_LAYERS", "HL_MOE_LAYER_RECOMPUTE", "HL_MOE_GROUPED_GEMM", "HL_TOKEN_DISPATCHER_TYPE"),
    *("HL_DATA_DIR_ROOT", "HL_DATA_FILE_PREFIX", "HL_CHECKPOINTS_DIR", "HL_LOAD_DIR", "HL_SAVE", "HL_EXIT_INTERVAL"),
    *("HL_KILL_SWITCH_FILE", "HL_FISRT_PP_STAGE_LAYERS", "HL_LAST_PP_STAGE_LAYERS", "HL_LR_DECAY_ITER"),
    *("HL_AUX_LOSS_COEFF", "HL_DROPOUT", "HL_PROFILE_TYPE", "HL_TENSORBOARD_DIR"),
}


@dataclass
class Asked:
    """The variables that are set, and what has become of them."""

    values: dict[str, str]
    base: dict[str, Any]
    said: list[str] = field(default_factory=list)
    keys: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, environ: Mapping[str, str], base: dict[str, Any], assumed: Mapping[str, str]) -> "Asked":
        """Raises ConfigError that names every unknown variable with the nearest known one."""
        unknown = [name for name in environ if name.startswith("HL_") and name not in KNOWN]
        if unknown:
            raise ConfigError(
                *(f"{name}={environ[name]}: unknown variable; {nearest(name, KNOWN)}" for name in unknown)
            )
        given = {name: value for name, value in environ.items() if name in KNOWN and value}
        for other, name in OTHER_NAMES.items():
            if other in given and given.setdefault(name, given[other]) != given.pop(other):
                raise ConfigError(f"{other} and {name} mean the same and have two values; leave one out")
        return cls({**assumed, **given}, base)

    def number(self, name: str, least: int = 1) -> int | None:
        """A whole number, None where it is not set."""
        return nodes.count(name, self.values[name], least) if name in self.values else None

    def switch(self, name: str) -> bool | None:
        """0 or 1, None where it is not set."""
        value = self.choice(name, "0", "1")
        return None if value is None else value == "1"

    def choice(self, name: str, *legal: str) -> str | None:
        """One of a few values, None where it is not set."""
        value = self.values.get(name)
        if value is not None and value not in legal:
            raise ConfigError(f"{name} is {value!r}, but must be {', '.join(legal[:-1])} or {legal[-1]}")
        return value

    def becomes(self, name: str, keys: Mapping[str, Any], why: str = "", text: str = "no key") -> None:
        """Note what a variable becomes; `text` says it where that is no key of its own."""
        self.keys |= keys
        text = ", ".join(f"{key}: {shown(value)}" for key, value in keys.items()) or text
        self.said.append(f"{name}={self.values.get(name, '')}  ->  {text}" + (f"  ({why})" if why else ""))

    def of_base(self, dotted_key: str, default: Any = None) -> Any:
        """What the YAML will say at a key."""
        value: Any = self.base
        for part in dotted_key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return self.keys.get(dotted_key, default if value is None else value)


class Plain(yaml.SafeDumper):
    """YAML in which a list that is there twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def shown(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(value, Dumper=Plain, default_flow_style=True, width=10_000, sort_keys=False)
    return text.removesuffix("...\n").strip()


def translate(asked: Asked) -> None:
    """Every variable that is set to its keys. Raises ConfigError where a value has no counterpart."""
    for name, keys in NUMBERS.items():
        if name in asked.values:
            value = asked.number(name, 0 if name == "HL_NUM_WORKERS" else 1)
            asked.becomes(name, dict.fromkeys(keys, max(value, 1)))
    for name, key in SWITCHES.items():
        if name in asked.values:
            asked.becomes(name, {key: asked.switch(name)})
    for name, key in TEXTS.items():
        if name in asked.values:
            asked.becomes(name, {key: asked.values[name]})
    degrees(asked)
    batch(asked)
    experts(asked)
    recompute(asked)
    data(asked)
    saving(asked)
    for name, why in WITHOUT_EFFECT.items():
        if name in asked.values:
            asked.becomes(name, {}, why)


def degrees(asked: Asked) -> None:
    """Layers of the stages, and what follows from data_parallel."""
    if "HL_DP" in asked.values:
        columns = len(asked.of_base("train_dataset.input_columns", [1] * 4))
        asked.becomes("HL_DP", {"parallel.dataset_strategy": [[asked.number("HL_DP"), 1]] * columns})
    stages, layers = asked.of_base("parallel_config.pipeline_stage", 1), asked.of_base(f"{MODEL}.num_layers")
    ends = {name: asked.number(name, 0) or 0 for name in ("HL_FISRT_PP_STAGE_LAYERS", "HL_LAST_PP_STAGE_LAYERS")}
    first, last = ends.values()
    if not first and not last:
        if "HL_PP" in asked.values or "HL_NUM_LAYERS" in asked.values:
            asked.becomes("HL_PP", {f"{MODEL}.offset": 0}, f"{layers} layers over {stages} stages")
        return
    middle = stages - bool(first) - bool(last)
    if middle < 0 or (layers - first - last) % max(middle, 1) or (middle == 0 and layers != first + last):
        raise ConfigError(
            f"HL_FISRT_PP_STAGE_LAYERS {first} and HL_LAST_PP_STAGE_LAYERS {last} leave {layers - first - last} of "
            f"{layers} layers for {max(middle, 0)} stages, which must share them evenly"
        )
    held = [first] * bool(first) + [(layers - first - last) // max(middle, 1)] * middle + [last] * bool(last)
    name = next(name for name, value in ends.items() if value)
    asked.becomes(name, {f"{MODEL}.offset": [count - layers // stages for count in held]})


def batch(asked: Asked) -> None:
    """HL_GBS and what is counted in it."""
    size, dp = asked.of_base("runner_config.batch_size", 1), asked.of_base("parallel_config.data_parallel", 1)
    pipeline = asked.of_base("parallel_config.pipeline_stage", 1) > 1
    key = "parallel_config.micro_batch_num" if pipeline else "runner_config.gradient_accumulation_steps"
    other = "runner_config.gradient_accumulation_steps" if pipeline else "parallel_config.micro_batch_num"
    total = asked.number("HL_GBS")
    if total is not None:
        if total % (size * dp):
            raise ConfigError(
                f"HL_GBS is {total}, but must be a multiple of HL_MICRO_BATCH x HL_DP = {size} x {dp} = {size * dp}"
            )
        asked.becomes("HL_GBS", {key: total // (size * dp), other: 1}, f"{total} = {size} x {dp} x {key.split('.')[1]}")
    steps = asked.number("HL_TRAIN_ITERS")
    if steps is not None:
        samples = steps * size * dp * asked.of_base(key, 1)
        asked.becomes(
            "HL_TRAIN_ITERS", {"train_dataset.data_loader.sizes": [samples, 0, 0]}, f"samples of {steps} steps"
        )
    decay = asked.number("HL_LR_DECAY_ITER")
    if decay is not None:
        schedule = asked.of_base("lr_schedule.type")
        if schedule != "WarmupStableCosineStepsLR":
            raise ConfigError(f"HL_LR_DECAY_ITER: lr_schedule.type is {schedule!r}; set that schedule's own keys")
        warmup = asked.of_base("lr_schedule.warmup_steps", 0)
        keys = {"lr_schedule.stable_steps": 0, "lr_schedule.decay_steps": max(decay - warmup, 1)}
        keys |= {"lr_schedule.final_lr": None, "lr_schedule.final_start_step": None}
        asked.becomes("HL_LR_DECAY_ITER", keys, f"cosine to lr_end after {warmup} steps of warm-up")


def experts(asked: Asked) -> None:
    """Dispatch, dense layers and the balance loss."""
    drop = asked.choice("HL_TOKEN_DROP", "0", "1", "2")
    if drop == "1":
        keys = {"moe_config.use_gmm": False, "moe_config.capacity_factor": 1.0, "moe_config.enable_sdrop": False}
        tokens = asked.of_base(f"{MODEL}.seq_length") // asked.of_base("parallel_config.model_parallel", 1)
        group = min(asked.of_base("moe_config.expert_group_size") or tokens, tokens)
        asked.becomes("HL_TOKEN_DROP", keys | {"moe_config.expert_group_size": group}, "lowest-ranked choices drop")
    elif drop is not None:
        why = "2 is dropless in Gaudi's fixed shapes" if drop == "2" else "dropless"
        asked.becomes("HL_TOKEN_DROP", {"moe_config.use_gmm": True}, why)
    grouped = asked.switch("HL_MOE_GROUPED_GEMM")
    if grouped is not None and drop == "1":
        asked.becomes("HL_MOE_GROUPED_GEMM", {}, "experts of equal capacity are one batched matmul")
    elif grouped is False:
        raise ConfigError("HL_MOE_GROUPED_GEMM is '0', but dropless experts are a grouped matmul; or HL_TOKEN_DROP=1")
    elif grouped:
        asked.becomes("HL_MOE_GROUPED_GEMM", {"moe_config.use_gmm": True})
    dispatcher = asked.choice("HL_TOKEN_DISPATCHER_TYPE", "alltoall", "allgather")
    if dispatcher:
        why = "" if dispatcher == "alltoall" else "tokens go by all-to-all here; the numbers are the same"
        asked.becomes("HL_TOKEN_DISPATCHER_TYPE", {"parallel.enable_alltoall": True}, why)
    dense = asked.number("HL_MOE_SKIP_FIRST_LAYERS", 0)
    if dense is not None:
        asked.becomes("HL_MOE_SKIP_FIRST_LAYERS", {"moe_config.first_k_dense_replace": dense})
    if "HL_AUX_LOSS_COEFF" in asked.values:
        keys = {"moe_config.aux_loss_types": ["expert"]}
        keys |= {"moe_config.aux_loss_factors": [decimal(asked, "HL_AUX_LOSS_COEFF")]}
        asked.becomes("HL_AUX_LOSS_COEFF", keys, "sequence-wise")
    if "HL_DROPOUT" in asked.values:
        if decimal(asked, "HL_DROPOUT"):
            raise ConfigError(f"HL_DROPOUT is {asked.values['HL_DROPOUT']!r}, but DeepSeek's models have none; use 0")
        asked.becomes("HL_DROPOUT", {}, "DeepSeek's models have none")


def recompute(asked: Asked) -> None:
    """HL_CKP_ACT: 0 keeps activations, 1 computes layers again, 2 the operators that sharding.py names."""
    kind = asked.choice("HL_CKP_ACT", "0", "1", "2")
    if kind is not None:
        keys = {"recompute_config.recompute": kind == "1", "recompute_config.select_recompute": kind == "2"}
        asked.becomes("HL_CKP_ACT", keys)
    if "HL_RECOMPUTE_NUM_LAYERS" in asked.values:
        if asked.number("HL_RECOMPUTE_NUM_LAYERS") != 1:
            raise ConfigError(
                f"HL_RECOMPUTE_NUM_LAYERS is {asked.values['HL_RECOMPUTE_NUM_LAYERS']!r}, but a layer is computed "
                "again by itself: use 1, or recompute_config.recompute with a number of layers for each stage"
            )
        asked.becomes("HL_RECOMPUTE_NUM_LAYERS", {}, "every layer by itself")
    if asked.switch("HL_MOE_LAYER_RECOMPUTE"):
        raise ConfigError(
            "HL_MOE_LAYER_RECOMPUTE is '1', but experts are not computed again alone; use HL_CKP_ACT=1 or 2"
        )


def data(asked: Asked) -> None:
    """The .bin/.idx pair: root and prefix are one path."""
    root, prefix = asked.values.get("HL_DATA_DIR_ROOT"), asked.values.get("HL_DATA_FILE_PREFIX")
    if (root is None) != (prefix is None):
        missing = "HL_DATA_FILE_PREFIX" if prefix is None else "HL_DATA_DIR_ROOT"
        raise ConfigError(f"{missing} is not set, but the other half of the data's path is; set both")
    if root is not None:
        asked.becomes(
            "HL_DATA_DIR_ROOT", {f"{DATA}.data_path": ["1", str(Path(root) / prefix)]}, f"HL_DATA_FILE_PREFIX={prefix}"
        )


def saving(asked: Asked) -> None:
    """Checkpoints, logs, where a run goes on from, and when it ends."""
    callbacks = [dict(item) for item in asked.base.get("callbacks", [])]
    savers = [item for item in callbacks if item.get("type") == "CheckpointMonitor"]
    changed = False
    for name, key in (("HL_SAVE_INTERVAL", "save_checkpoint_steps"), ("HL_CHECKPOINTS_DIR", "directory")):
        if name in asked.values and savers and asked.switch("HL_SAVE") is not False:
            changed = True
            value = asked.values[name] if key == "directory" else asked.number(name)
            savers[0][key] = value
            asked.becomes(name, {}, text=f"callbacks: CheckpointMonitor.{key}: {value}")
    if asked.switch("HL_SAVE") is False:
        changed, callbacks = True, [item for item in callbacks if item not in savers]
        asked.becomes("HL_SAVE", {}, text="callbacks: no CheckpointMonitor")
    for name, key in (("HL_LOG_INTERVAL", "per_print_times"), ("HL_TENSORBOARD_DIR", "tensorboard_dir")):
        if name in asked.values:
            value = asked.number(name) if key == "per_print_times" else asked.values[name]
            for item in callbacks:
                if item.get("type") == "TrainingMetrics":
                    changed, item[key] = True, value
            asked.becomes(name, {}, text=f"callbacks: TrainingMetrics.{key}: {value}")
    stop = asked.number("HL_EXIT_INTERVAL", 0)
    if stop:
        changed = True
        callbacks.append({"type": "TrainCallBack", "stop_step": stop})
        asked.becomes("HL_EXIT_INTERVAL", {}, text=f"callbacks: TrainCallBack.stop_step: {stop}")
    if changed:
        asked.keys["callbacks"] = callbacks
    folder = asked.values.get("HL_LOAD_DIR") or asked.values.get("HL_CHECKPOINTS_DIR")
    if folder is not None:
        there = (Path(folder) / "latest").exists()
        keys = {"load_checkpoint": folder, "resume_training": True} if there else {}
        name = "HL_LOAD_DIR" if "HL_LOAD_DIR" in asked.values else "HL_CHECKPOINTS_DIR"
        if "HL_LOAD_DIR" in asked.values and not there:
            raise ConfigError(f"HL_LOAD_DIR is {folder!r}, which holds no checkpoint of this project (no `latest`)")
        asked.becomes(name, keys, "" if there else "no checkpoint there yet, so training begins")
    if "HL_KILL_SWITCH_FILE" in asked.values:
        asked.becomes("HL_KILL_SWITCH_FILE", {"use_graceful_exit": True}, "the file is OUTPUT_DIR/kill_switch")
    if "HL_PROFILE_TYPE" in asked.values:
        asked.becomes("HL_PROFILE_TYPE", {"profile": True}, "MindSpore's profiler")


def decimal(asked: Asked, name: str) -> float:
    """A number with a fraction."""
    if not re.fullmatch(r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?", asked.values[name]):
        raise ConfigError(f"{name} is {asked.values[name]!r}, but must be a number of at least 0")
    return float(asked.values[name])


def machines(asked: Asked) -> tuple[int | None, list[str]]:
    """Ranks of the job, and the launcher's arguments; none of them where the cluster says which machine this is."""
    if not any(name in asked.values for name in MACHINES):
        return None, []
    count, each = asked.number("HL_NUM_NODES") or 1, asked.number("HL_DEVICES_PER_NODE") or 8
    asked.becomes("HL_NUM_NODES", {}, f"HL_DEVICES_PER_NODE={each}", text=f"{count * each} ranks")
    rank, host = asked.values.get("HL_TORCHRUN_NODE_RANK", ""), asked.values.get("HL_TORCHRUN_MASTER_ADDR", "")
    if count > 1 and bool(rank) != bool(host):
        missing = "HL_TORCHRUN_MASTER_ADDR" if rank else "HL_TORCHRUN_NODE_RANK"
        raise ConfigError(f"{missing} is not set, but the other one is; set both on every machine, or neither")
    arguments = [] if count > 1 and not rank else [str(count * each), str(each), host, "", rank]
    return count * each, arguments


def given_words(keys: Mapping[str, Any]) -> Iterator[str]:
    """The keys as options of run_mindformer.py."""
    for key, value in keys.items():
        yield from (f"--{key}", shown(value))


def run(argv: list[str], environ: Mapping[str, str]) -> None:
    """Print, check, and start the launcher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help=f"YAML underneath; default {BASE} with Gaudi's own defaults")
    parser.add_argument("--dry_run", action="store_true", help="print and check only")
    options, rest = parser.parse_known_args(argv)
    config = options.config or BASE
    asked = Asked.of(environ, load_yaml(find(config)), {} if options.config else GAUDI)
    translate(asked)
    workers, arguments = machines(asked)
    print("\n".join(asked.said))
    words = ["run_mindformer.py", "--config", config, *given_words(asked.keys), *rest, "--use_parallel", "True"]
    plan = read_plan(words[1:], workers)
    refuse(plan, check_plan(plan))
    print(f"The plan is legal: {plan.device_num} ranks, {plan.global_batch} sequences a step.")
    launch = ["bash", str(ROOT / "scripts/msrun_launcher.sh"), shlex.join(words), *arguments]
    if options.dry_run:
        print(shlex.join(launch))
        return
    if workers and not arguments and not nodes.find([], environ, lambda: plan.device_num).of_a_cluster:
        raise ConfigError(
            f"HL_NUM_NODES is {asked.values['HL_NUM_NODES']}, but nothing says which machine this is; set "
            "HL_TORCHRUN_NODE_RANK and HL_TORCHRUN_MASTER_ADDR on every machine, or start by Slurm or Kubernetes"
        )
    sys.stdout.flush()
    os.execvp(launch[0], launch)


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: run(sys.argv[1:], os.environ)))
