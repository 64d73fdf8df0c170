"""One rank of `cpu_parallel.job`: run_mindformer.py inside the job's shared memory.

    python -m mindformers_ext.cpu_parallel.worker FAILURE_FILE --config Y [run_mindformer's other arguments]

The environment says which rank this is (rank_job.py).
"""

import sys
from functools import partial
from pathlib import Path

from mindformers_ext.collectives.rank_job import RankJob
from mindformers_ext.cpu_parallel.run_rank import as_rank
from mindformers_ext.training.start import run

LOWERED_STEP = "mindformers_ext.cpu_parallel.lowered_step"


def main() -> None:
    job = RankJob.current()
    failure, arguments = Path(sys.argv[1]), sys.argv[2:]
    as_rank(job.job, job.rank, job.world_size, failure, partial(run, arguments, register=[LOWERED_STEP]))


if __name__ == "__main__":
    main()
