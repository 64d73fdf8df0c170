"""Turn a semi-auto-parallel run into what one rank builds on CPU: the whole model, fed the global batch."""

from typing import Any

from mindformers_ext.config.run import Run


def one_process_overrides(run: Run) -> dict[str, Any]:
    """Keys of the YAML that take every split out; the same weights and the same samples of a step remain."""
    return {
        "use_parallel": False,
        "parallel": {"parallel_mode": 0},
        "parallel_config": {},
        "recompute_config": {},
        "model.model_config.offset": 0,
        "model.model_config.pp_interleave_num": 1,
        "runner_config.batch_size": run.global_batch,
        "runner_config.gradient_accumulation_steps": 1,
    }


def as_rank(run: Run) -> Run:
    """The run of one process, with the rank's lowered graph as its training step."""
    return run.changed([*one_process_overrides(run).items(), ("runner_wrapper.type", "LoweredTrainStep")])
