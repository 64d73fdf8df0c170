"""One rank of `cpu_parallel.job`: run_mindformer.py inside the job's shared memory.

    python -m mindformers_ext.cpu_parallel.worker FAILURE_FILE --config Y [run_mindformer's other arguments]

The environment says which rank this is (rank_job.py). For verify.py, rank_server.py forks ranks and single processes
of many runs from one process that has imported everything.
"""

import importlib
import sys
from functools import partial
from pathlib import Path

from mindformers_ext.collectives.rank_job import RankJob, is_cpu_rank
from mindformers_ext.config.command_line import build_parser
from mindformers_ext.cpu_parallel.run_rank import as_rank
from mindformers_ext.errors import exit_code_of
from mindformers_ext.training.start import prepare_environment, run

LOWERED_STEP = "mindformers_ext.cpu_parallel.lowered_step"


def preload(arguments: list[str]) -> None:
    """Import what `main(arguments)` will. MindFormers' own log files are those of this run."""
    options, _ = build_parser().parse_known_args(arguments[1:])
    prepare_environment(options.register_path, options.output_dir)
    from mindformers_ext.training import run_modes  # noqa: F401

    importlib.import_module(LOWERED_STEP)


def main(arguments: list[str] | None = None) -> int:
    """Run as a rank, or as one process where the environment names no job."""
    failure, *arguments = sys.argv[1:] if arguments is None else arguments
    if not is_cpu_rank():
        return exit_code_of(partial(run, arguments))
    job = RankJob.current()
    as_rank(job.job, job.rank, job.world_size, Path(failure), partial(run, arguments, register=[LOWERED_STEP]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
