"""Turn a semi-auto-parallel configuration into what one rank builds on CPU: the whole model, fed the global batch."""

from pathlib import Path
from typing import Any

from mindformers_ext.config.run_plan import RunPlan, make_plan
from mindformers_ext.config.yaml_files import override


def one_process_overrides(plan: RunPlan) -> dict[str, Any]:
    """Keys of the YAML that take every split out; the same weights and the same samples of a step remain."""
    return {
        "use_parallel": False,
        "parallel": {"parallel_mode": 0},
        "parallel_config": {},
        "recompute_config": {},
        "model.model_config.offset": 0,
        "runner_config.batch_size": plan.global_batch,
        "runner_config.gradient_accumulation_steps": 1,
    }


def as_rank(config: dict, path: str | Path) -> None:
    """Change `config` in place: one process, with the rank's lowered graph as its training step."""
    for key, value in one_process_overrides(make_plan(config, path)).items():
        override(config, key, value, path)
    config.setdefault("runner_wrapper", {})["type"] = "LoweredTrainStep"
