"""Steps that are left out: their gradients are not finite, or their global norm is far off what was usual.

Extends `use_skip_data_by_global_norm` of MindFormers 1.9.0, whose limit is one number for the whole training. The step
itself leaves weights, moments and counters alone (training/wrapper.py), on every rank, as all have the same norm; this
callback moves the limit, says which documents were in the step, and stops a run that leaves out step after step.
"""

import math
import statistics
from collections import deque
from typing import Any

from mindformers.tools.logger import logger
from mindspore import Tensor
from mindspore.common import dtype as mstype
from mindspore.train import Callback, RunContext

from mindformers_ext.bin_dataset.sample_order import passages, ranges_of
from mindformers_ext.config.sections import MonitorConfig
from mindformers_ext.data.data_position import samples_read, source_of, start_of
from mindformers_ext.errors import TrainingStopped
from mindformers_ext.training.metrics import as_float, samples_per_step
from mindformers_ext.training.wrapper import as_numpy, was_left_out

NORMS = "gradient_norms"  # of Meta.health


class BadSteps(Callback):
    """Leave `cb_params.left_out` to the callbacks that report, None for a step that counted.

    Runs before all others that look at a step.
    """

    def __init__(self, config: MonitorConfig):
        super().__init__()
        self.config = config
        self.fixed = config.global_norm_spike_threshold or math.inf
        self.norms: deque[float] = deque(maxlen=config.global_norm_spike_window)
        self.in_a_row, self.why = 0, ""

    def on_train_begin(self, run_context: RunContext) -> None:
        """Go on with the norms that were usual before."""
        cb_params = run_context.original_args()
        restored = cb_params.get("restored")
        self.norms.extend(restored.health.get(NORMS, []) if restored else [])
        cb_params.health[NORMS] = self.norms
        self.set_limit(cb_params.train_network)

    @property
    def limit(self) -> float:
        """What the norm of the next step must stay below."""
        if self.config.global_norm_spike_factor is None or len(self.norms) < self.norms.maxlen:
            return self.fixed
        return min(self.fixed, self.config.global_norm_spike_factor * statistics.median(self.norms))

    def set_limit(self, network: Any) -> None:
        """Tell the step."""
        network.global_norm_spike_threshold.set_data(Tensor([self.limit], mstype.float32))

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Stop where one more step would make no difference; the last one has been recorded."""
        most = self.config.global_norm_spike_count_threshold
        if self.in_a_row >= most:
            raise TrainingStopped(
                f"{self.in_a_row} steps in a row were left out, the last because {self.why}: lower "
                "lr_schedule.learning_rate, look at the documents that metrics.jsonl names, or allow more with "
                f"monitor_config.global_norm_spike_count_threshold (now {most})"
            )

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Find out whether the step counted."""
        cb_params = run_context.original_args()
        network, outputs = cb_params.train_network, cb_params.net_outputs
        norm = float(as_numpy(outputs[4]).item())
        cb_params.left_out = None
        if not was_left_out(network, outputs):
            self.in_a_row = 0
            self.norms.append(norm)
            if self.config.global_norm_spike_factor is not None:
                self.set_limit(network)
            return
        self.in_a_row += 1
        above = f"its gradient norm is {norm:.4g} and not below {self.limit:.4g}"
        self.why = above if math.isfinite(norm) else f"its gradient norm is {norm}"
        cb_params.left_out = {"why": self.why, **self.data_of(cb_params)}
        step = start_of(cb_params).step + cb_params.cur_step_num
        documents = "; ".join(cb_params.left_out.get("documents", []))
        logger.warning("step %d is left out: %s; in it were %s", step, self.why, documents or "samples of other data")

    def data_of(self, cb_params: Any) -> dict[str, Any]:
        """The samples of the step, and the documents that they are made of."""
        data, start = cb_params.train_dataset, start_of(cb_params)
        dataset = getattr(source_of(data), "dataset", None)
        if not hasattr(dataset, "description"):
            return {}
        samples = samples_read(data, start, cb_params.cur_step_num, samples_per_step(data))
        documents = [str(passage) for sample in samples for passage in passages(dataset, sample)]
        return {"samples": ranges_of(sorted(samples)), "documents": documents}


class StopAtNotFinite(Callback):
    """End a run at the first step whose loss or gradient norm is not finite; the metrics have its line already.

    In place of MindFormers 1.9.0's TrainingStateMonitor, whose ValueError ends in a traceback.
    """

    def on_train_step_end(self, run_context: RunContext) -> None:
        """All ranks have the same norm, and a loss that is not finite makes one that is not: they end together."""
        cb_params = run_context.original_args()
        loss, *_, norm = cb_params.net_outputs[:5]
        for what, value in (("loss", as_float(loss)), ("gradient norm", as_float(norm))):
            if value is not None and not math.isfinite(value):
                raise TrainingStopped(
                    f"the {what} of step {start_of(cb_params).step + cb_params.cur_step_num} is {value} and "
                    "check_for_nan_in_loss_and_grad is True: lower lr_schedule.learning_rate, look at the data, or set "
                    "it to False, and steps whose gradients are not finite are left out"
                )
