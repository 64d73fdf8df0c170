"""Steering a run from outside: end it at the next step with a complete checkpoint, or have one written now.

Extends `use_graceful_exit` of MindFormers 1.9.0, whose OnRequestExit saves files of its own and needs a switch in the
compiled graph. All ranks agree after a step, outside the graph, so they end after the same one.
"""

import time
from pathlib import Path

import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.utils import get_output_root_path
from mindspore.train import Callback, RunContext

from mindformers_ext.training import start
from mindformers_ext.training.over_ranks import place_in_run, reduce_over_ranks

KILL_SWITCH, SAVE_NOW = "kill_switch", "save_now"  # files in output_dir
NOTHING, SAVE, STOP = range(3)


class Steering(Callback):
    """Look after every step for the files in output_dir, the signals (training/start.py) and the clock.

    Leaves `cb_params.save_now` to CheckpointMonitor, which runs after it. A file is removed when it was obeyed.
    """

    def __init__(self, graceful_exit: bool, max_train_hours: float | None):
        super().__init__()
        self.graceful_exit, self.max_train_hours = graceful_exit, max_train_hours
        self.folder = Path(get_output_root_path())

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Do what somebody has asked for."""
        cb_params = run_context.original_args()
        asked, why = self.asked()
        asked = int(reduce_over_ranks(np.array([asked], np.float32), "max")[0])
        cb_params.save_now = asked == SAVE
        if asked == NOTHING:
            return
        if asked == STOP:
            run_context.request_stop()
            logger.info("the run ends after step %d: %s", cb_params.cur_step_num, why or "another rank was asked to")
        if place_in_run()[0] == 0:
            (self.folder / (KILL_SWITCH if asked == STOP else SAVE_NOW)).unlink(missing_ok=True)

    def asked(self) -> tuple[int, str]:
        """What this rank was asked for, and how; the first rank alone looks at files and clock."""
        if start.signals:
            return STOP, f"it got {start.signals[0].name}"
        if place_in_run()[0]:
            return NOTHING, ""
        hours = (time.monotonic() - start.STARTED) / 3600
        if self.max_train_hours is not None and hours >= self.max_train_hours:
            return STOP, f"max_train_hours {self.max_train_hours} are over"
        if self.graceful_exit and (self.folder / KILL_SWITCH).exists():
            return STOP, f"{self.folder / KILL_SWITCH} is there"
        return (SAVE if self.graceful_exit and (self.folder / SAVE_NOW).exists() else NOTHING), ""
