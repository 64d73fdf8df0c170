"""What the ranks of a run find out together outside their graphs, after a step."""

import mindspore as ms
import numpy as np
from mindformers.tools.utils import get_real_group_size, get_real_rank
from mindspore import Tensor, ops

from mindformers_ext.collectives import collectives
from mindformers_ext.collectives.rank_job import RankJob, is_cpu_rank
from mindformers_ext.config.pipeline import FOLDED


def place_in_run() -> tuple[int, int, int]:
    """This process's rank, the devices of the run, and the rank that tells the loss: only its stage knows it."""
    if is_cpu_rank():
        job = RankJob.current()
        rank, devices, stages, loss_stage = job.rank, job.world_size, job.stages, job.loss_stage
    else:
        rank, devices = get_real_rank(), get_real_group_size()
        stages = ms.get_auto_parallel_context("pipeline_stages")
        loss_stage = 0 if ms.get_auto_parallel_context("pipeline_scheduler") == FOLDED else stages - 1
    return rank, devices, (loss_stage + 1) * devices // stages - 1 if stages > 1 else 0


def reduce_over_ranks(values: np.ndarray, reduce: str) -> np.ndarray:
    """The "sum" or "max" of float32 values over all ranks of the run; MindSpore reduces no integers on CPU."""
    rank, ranks, _ = place_in_run()
    if ranks == 1:
        return values
    if is_cpu_rank():
        return collectives.all_reduce(values, range(ranks), reduce)
    if reduce == "max" and ms.get_context("device_target") == "CPU":  # where MindSpore knows sums only
        of_ranks = np.zeros((ranks, *values.shape), values.dtype)
        of_ranks[rank] = values
        return ops.AllReduce()(Tensor(of_ranks)).asnumpy().max(0)
    return ops.AllReduce(reduce)(Tensor(values)).asnumpy()
