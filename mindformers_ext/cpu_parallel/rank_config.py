"""Turn a semi-auto-parallel configuration into what one rank builds on CPU: the whole model, fed the global batch."""

from pathlib import Path

from mindformers_ext.dryrun.run_plan import make_plan


def as_one_process(config: dict, path: str | Path) -> None:
    """Take every split out of `config`, in place; the same weights and the same samples of a step remain."""
    config["runner_config"]["batch_size"] = make_plan(config, path).global_batch
    config["runner_config"]["gradient_accumulation_steps"] = 1
    config["use_parallel"] = False
    config["parallel"] = {"parallel_mode": 0}
    config["parallel_config"] = {}
    config["recompute_config"] = {}
    config["model"]["model_config"]["offset"] = 0


def as_rank(config: dict, path: str | Path) -> None:
    """`as_one_process`, and the rank's lowered graph as the training step."""
    as_one_process(config, path)
    config.setdefault("runner_wrapper", {})["type"] = "LoweredTrainStep"
