"""A rank that tells where it is, and ends with its stack in the log when a step takes for ever.

MindFormers 1.9.0 leaves a rank that hangs to HCCL's timeout, which names no line of the program.
"""

import faulthandler
import signal
import sys
from pathlib import Path

from mindformers.tools.utils import get_output_root_path
from mindspore.train import Callback, RunContext

from mindformers_ext.collectives.rank_job import is_cpu_rank
from mindformers_ext.data.data_position import start_of
from mindformers_ext.files import heartbeat
from mindformers_ext.training.over_ranks import place_in_run

PATIENCE = 1.5  # a rank on CPU has a launcher, which knows more than it and acts first


class Heartbeat(Callback):
    """Write a beat before and after every step; the first step, which compiles, may take any time.

    Args:
        minutes: a rank that hangs for longer prints its stacks and ends with exit code 1. SIGUSR2 prints them too.
    """

    def __init__(self, minutes: float):
        super().__init__()
        self.seconds = minutes * 60 * (PATIENCE if is_cpu_rank() else 1.0)
        self.stepped = False
        self.folder, self.rank = Path(get_output_root_path()), place_in_run()[0]

    def on_train_begin(self, run_context: RunContext) -> None:
        """Listen."""
        faulthandler.register(signal.SIGUSR2, file=sys.stderr, all_threads=True)

    def beat(self, run_context: RunContext, in_step: bool) -> None:
        """Write where this rank is."""
        cb_params = run_context.original_args()
        step, compiling = cb_params.cur_step_num, in_step and not self.stepped
        step += start_of(cb_params).step
        heartbeat.write(self.folder, heartbeat.Beat.of_this_process(self.rank, step, in_step, compiling))

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """In the step."""
        self.beat(run_context, True)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """After the step, and before whatever the other callbacks do."""
        self.stepped = True
        self.beat(run_context, False)
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.stderr)

    def on_train_end(self, run_context: RunContext) -> None:
        """The last checkpoint may take longer."""
        faulthandler.cancel_dump_traceback_later()
        heartbeat.end(self.folder, self.rank)
