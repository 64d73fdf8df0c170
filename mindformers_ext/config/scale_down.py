"""A YAML of a cluster as one of a few ranks that keeps its structure, so that its strategy is proved on one machine.

What stays: which degrees are above one, whether experts spread beyond a model-parallel group, chunks and scheduler,
uneven offsets, recomputation by stage, dispatcher, balancing, MTP, operators, optimizer shards. What shrinks: sizes,
layers to one or two a chunk, and every degree to two. Numbers become float32, so that ranks and one process agree.
"""

from itertools import product
from pathlib import Path
from typing import Any

import yaml

from mindformers_ext.config.pipeline import Place
from mindformers_ext.config.run import Run
from mindformers_ext.errors import ConfigError
from mindformers_ext.files.atomic import whole_file

AXES = {"dp": "data_parallel", "cp": "context_parallel", "mp": "model_parallel", "pp": "pipeline_stage"}
FLOAT32 = "compute_dtype layernorm_compute_type softmax_compute_type rotary_dtype router_dense_type param_init_type"
LENGTH = 32  # tokens of a sample


def small_model(run: Run, layers: int = 2) -> dict[str, Any]:
    """Overrides that make a run's model as small as it can be with every part that it has."""
    model, moe = run.model, run.model.moe_config
    experts = min(moe.expert_num, 8)
    sizes = {
        "seq_length": LENGTH,
        "max_position_embeddings": max(model.max_position_embeddings, LENGTH),
        "hidden_size": 64,
        "num_layers": layers,
        "num_heads": 4,
        "n_kv_heads": 4,
        "intermediate_size": 128,
        "kv_lora_rank": 32,
        "q_lora_rank": model.q_lora_rank and 48,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "vocab_size": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "batch_size": 1,
        "mtp_depth": min(model.mtp_depth, 2),
        **dict.fromkeys(FLOAT32.split(), "float32"),
    }
    group = moe.expert_group_size and min(moe.expert_group_size, LENGTH // 4)
    routed = {
        "expert_num": experts,
        "num_experts_chosen": min(moe.num_experts_chosen, 2),
        "n_group": 2 if moe.n_group > 1 else 1,
        "topk_group": 1 if moe.topk_group < moe.n_group else 2 if moe.n_group > 1 else 1,
        "shared_expert_num": min(moe.shared_expert_num, 1),
        "moe_intermediate_size": 32,
        "first_k_dense_replace": min(moe.first_k_dense_replace, 1),
        "expert_group_size": group,
    }
    found = {f"model.model_config.{key}": value for key, value in sizes.items()}
    found |= {f"moe_config.{key}": value for key, value in routed.items()} if moe.expert_num > 1 else {}
    return found | {"train_dataset.data_loader.config.seq_length": LENGTH, "runner_config.batch_size": 1}


def scaled(run: Run, ranks: int) -> Run:
    """The run on `ranks` devices. Raises ConfigError when they are too few for its structure."""
    split = [axis for axis in AXES if getattr(run, axis) > 1]
    least = 2 ** len(split)
    if ranks < least or ranks & (ranks - 1):
        names = " x ".join(f"{AXES[axis]} 2" for axis in split) or "nothing split"
        raise ConfigError(
            f"{run.path}: --ranks is {ranks}, but {names} needs a power of two of at least {least}; nearest legal: "
            f"{max(least, 1 << (ranks.bit_length() - 1))}"
        )
    degrees = {axis: 2 if axis in split else 1 for axis in AXES}
    for grown in [axis for axis in ("dp", "pp", "cp", "mp") if axis in split][:1]:
        degrees[grown] *= ranks // least  # what is left makes one degree larger
    places = _kept_places(run, degrees["pp"])
    counts = {
        place: 1 + (run.pipeline.counts[old] > min(run.pipeline.counts.values())) for place, old in places.items()
    }
    layers = sum(counts.values())
    overrides = small_model(run, layers) | _degrees(run, degrees) | _lists(run, degrees["pp"], places, counts)
    return run.changed(overrides.items(), ranks)


def write(run: Run, path: Path) -> None:
    """Write a run's YAML."""
    with whole_file(path) as partial:
        partial.write_text(yaml.safe_dump(run.values, sort_keys=False))


def _kept_places(run: Run, stages: int) -> dict[Place, Place]:
    """{place of the small pipeline: place that it stands for}: the first stages and the last one."""
    kept = [*range(stages - 1), run.pp - 1]
    return {Place(s, c): Place(kept[s], c) for c, s in product(range(run.chunks), range(stages))}


def _degrees(run: Run, degrees: dict[str, int]) -> dict[str, Any]:
    stage = degrees["dp"] * degrees["cp"] * degrees["mp"]
    beyond = run.ep > run.cp * run.mp  # experts spread over ranks with other samples
    ep = 1 if run.ep == 1 else stage if run.ep == run.devices_per_stage else 2 * degrees["mp"] if beyond else 2
    columns = run.sections.train_dataset.input_columns or ["input_ids"]
    shard = run.optimizer_shard_size
    return {
        **{f"parallel_config.{AXES[axis]}": degree for axis, degree in degrees.items()},
        "parallel_config.expert_parallel": min(ep, stage),
        "parallel_config.micro_batch_num": 2 * degrees["pp"] if degrees["pp"] > 1 else 1,
        "runner_config.gradient_accumulation_steps": min(run.sections.runner_config.gradient_accumulation_steps, 2),
        "parallel.dataset_strategy": [[degrees["dp"], 1]] * len(columns),
        "parallel.parallel_optimizer_config.parallel_optimizer_threshold": 0,
        "parallel.parallel_optimizer_config.optimizer_weight_shard_size": shard if shard < 2 else 2,
        "lr_schedule": {"type": "ConstantWarmUpLR", "learning_rate": 1e-3, "warmup_steps": 1, "total_steps": 100},
        "load_checkpoint": "",
    }


def _lists(run: Run, stages: int, places: dict[Place, Place], counts: dict[Place, int]) -> dict[str, Any]:
    """Offset and recompute lists by chunk, each number as much of its chunk as in the big run: none, some or all."""
    chunks = range(run.chunks)
    last = Place(0 if run.pipeline.folded else stages - 1, run.chunks - 1)
    base = sum(counts.values()) // (stages * run.chunks)

    def rows(value) -> list:
        found = [[value(Place(stage, chunk)) for stage in range(stages)] for chunk in chunks]
        return found if run.chunks > 1 else found[0]

    found = {"model.model_config.offset": rows(lambda place: counts[place] - base) if stages > 1 else 0}
    for name in ("recompute", "select_recompute"):
        setting = run.value(f"recompute_config.{name}")
        if not isinstance(setting, list):
            continue
        covered = set(run.pipeline.covered(setting))

        def part(place: Place, covered: set[int] = covered) -> int:
            layers = run.pipeline.layers_of(*places[place])
            again = len(covered & set(layers))
            held = counts[place] + (min(run.model.mtp_depth, 2) if place == last else 0)
            return held if again == len(layers) else min(again, max(held - 1, 1))

        found[f"recompute_config.{name}"] = rows(part) if stages > 1 else bool(covered)
    return found
