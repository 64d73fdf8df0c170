"""What a run reports: a log line, metrics.jsonl and TensorBoard a step, a plot and a summary at the end.

Extends MindFormers 1.9.0's callbacks: its MFLossMonitor knows neither the parts of DeepSeek's loss nor the expert
loads, and takes FLOPs from Ascend's graph compiler. The Trainer runs callbacks of unknown classes last, so this one
sees the loads that TopkBiasBalanceCallback published.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import mindspore as ms
import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.tools.utils import get_output_root_path, get_real_group_size
from mindspore import Tensor, nn, ops
from mindspore.train import Callback, RunContext
from tensorboardX import SummaryWriter

from mindformers_ext.config.sections import Monitors
from mindformers_ext.data.data_position import start_of
from mindformers_ext.errors import TrainingStopped
from mindformers_ext.files.atomic import naming, whole_file, write_text
from mindformers_ext.training.device_peak import device_peak
from mindformers_ext.training.monitors import RunMonitors
from mindformers_ext.training.over_ranks import place_in_run
from mindformers_ext.training.topk_bias_callback import read_expert_load, reset_expert_load, sum_over_ranks
from mindformers_ext.training.wrapper import real_model, was_left_out

matplotlib.use("Agg")
from matplotlib import pyplot

SUMMARIZED = ("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm")  # of every record


def take_loss_parts(model: nn.Cell) -> tuple[float | None, ...]:
    """Return main, MTP and balance loss, the mean over this step's micro-batches and ranks, and reset them.

    Of V3.2 the indexers' loss, too. All None on a pipeline stage that computes no loss.
    """
    parts = sum_over_ranks(model.loss_parts).asnumpy().copy()  # on CPU the array shares the parameter's memory
    ops.assign(model.loss_parts, ops.zeros_like(model.loss_parts))
    if parts[3] == 0:
        return (None,) * (len(parts) - 1)
    return tuple(float(part) for part in np.delete(parts, 3) / parts[3])


def total_loss(model: nn.Cell, main: float | None, mtp: float, *others: float) -> float | None:
    """The loss that was trained, of its parts; None on a pipeline stage that computes none."""
    return None if main is None else main + as_float(model.mtp_factor()) * mtp + sum(others)


def take_dropped(model: nn.Cell) -> int | None:
    """Choices of experts that found no row in this step, with dropless_rows: bounded, over the layers here; reset."""
    counters = [router.dropped_choices for _, router in model.moe_routers() if hasattr(router, "dropped_choices")]
    dropped = sum(int(counter.asnumpy()[0]) for counter in counters)
    for counter in counters:
        ops.assign(counter, ops.zeros_like(counter))
    return dropped if counters else None


def samples_per_step(dataset: Any) -> int:
    """Samples of one optimizer step over all devices."""
    local = dataset.get_batch_size()
    mode = ms.get_auto_parallel_context("parallel_mode")
    if mode == "data_parallel":
        return local * get_real_group_size()
    strategy = ms.get_auto_parallel_context("dataset_strategy")
    if mode in ("semi_auto_parallel", "auto_parallel") and isinstance(strategy, (tuple, list)):
        return local * strategy[0][0]
    return local


def as_float(value: Any) -> float | None:
    """A scalar from a wrapper's output; None stays None."""
    if value is None:
        return None
    return float(np.mean(value.asnumpy() if isinstance(value, Tensor) else value))


def keep_lines_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file after `step`, which a resumed run writes again; all of them for step 0."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if step and path.exists() else []
    write_text(path, "".join(line + "\n" for line in lines if step_of(line) <= step))


def step_of(line: str) -> float:
    """The step of a line of metrics; infinite for half a line, the last thing a killed run wrote, or for no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf
    step = record.get("step") if isinstance(record, dict) else None
    return step if isinstance(step, int) else math.inf


def whole_records(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have what summary and plot show; others may have come from elsewhere."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record.keys() >= {*SUMMARIZED, "expert_load"}]


def stop_when_refused(tensorboard: SummaryWriter) -> None:
    """Let a TensorBoard file end where the disk takes no more.

    Its thread and its own end of the process write, and their tracebacks would follow the sentence about metrics.jsonl.
    """
    events = tensorboard.file_writer.event_writer._ev_writer
    refused = []

    def stopping(write: Callable) -> Callable:
        def call(*arguments: Any) -> None:
            if not refused:
                try:
                    write(*arguments)
                except OSError as error:
                    refused.append(error)

        return call

    for name in ("write_event", "flush", "close"):
        setattr(events, name, stopping(getattr(events, name)))


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class TrainingMetrics(Callback):
    """Log, record and plot the training; stop it when the loss or step after step of gradients is not finite.

    Writes metrics.jsonl, tensorboard/, training.png and summary.txt to `output_dir`, from one rank.

    Args:
        output_dir: folder of the files; default the run's output_dir.
        tensorboard_dir: folder of TensorBoard's; default `tensorboard` in output_dir.
        per_print_times: steps between log lines; metrics.jsonl has every step.
        device_peak_tflops: peak of one device in TFLOP/s; default 353.9 on Ascend, measured on CPU.
        max_skipped_steps: steps in a row that may be left out because their gradients are not finite. A dynamic loss
            scale of 2^16 needs 16 to find itself.
        monitors: what else to look at, and every how many steps (training/monitors.py).

    Raises:
        TrainingStopped: the loss is NaN or infinite, or more steps in a row were left out.
    """

    def __init__(
        self,
        output_dir: str | None = None,
        per_print_times: int = 1,
        device_peak_tflops: float | None = None,
        max_skipped_steps: int = 20,
        monitors: dict[str, int | None] | None = None,
        tensorboard_dir: str | None = None,
    ):
        super().__init__()
        self.folder = Path(output_dir or get_output_root_path())
        self.tensorboard_dir = Path(tensorboard_dir or self.folder / "tensorboard")
        self.per_print_times = per_print_times
        self.device_peak_tflops = device_peak_tflops
        self.monitors = RunMonitors(Monitors(**monitors)) if monitors else None
        self.records: list[dict[str, Any]] = []
        self.loads: dict[str, np.ndarray] = {}
        self.overflows, self.skipped_in_a_row, self.max_skipped_steps = 0, 0, max_skipped_steps

    def on_train_begin(self, run_context: RunContext) -> None:
        """Open the files and find out what a step costs."""
        cb_params = run_context.original_args()
        self.model = real_model(cb_params.train_network)
        self.first_step = start_of(cb_params).step
        self.last_step = cb_params.cur_step_num
        seq_length = self.model.config.seq_length
        self.tokens_per_step = samples_per_step(cb_params.train_dataset) * seq_length
        self.flops_per_token = self.model.flops_per_token(seq_length)
        rank, self.devices, writer = place_in_run()
        self.writes = rank == writer
        if self.writes:
            target = ms.get_context("device_target")
            self.peak_tflops, self.peak_source = device_peak(target, self.device_peak_tflops, self.devices)
            self.folder.mkdir(parents=True, exist_ok=True)
            keep_lines_until(self.metrics_path, self.first_step)
            self.tensorboard = SummaryWriter(str(self.tensorboard_dir))
            stop_when_refused(self.tensorboard)
            logger.info("a step is %s tokens on %d device(s)", f"{self.tokens_per_step:,}", self.devices)
        self.clock = time.perf_counter()

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Let the monitors look at what the step will change."""
        if self.monitors is not None:
            cb_params = run_context.original_args()
            self.monitors.begin(cb_params.train_network, self.first_step + cb_params.cur_step_num)

    @property
    def metrics_path(self) -> Path:
        """The file with one JSON object a step."""
        return self.folder / "metrics.jsonl"

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Record the step that has ended."""
        cb_params = run_context.original_args()
        now = time.perf_counter()
        steps = cb_params.cur_step_num - self.last_step
        tokens_per_s = self.tokens_per_step * steps / (now - self.clock)
        self.clock, self.last_step = now, cb_params.cur_step_num
        record = {"step": self.first_step + cb_params.cur_step_num}
        record |= self.losses(cb_params)
        if self.writes:
            record |= self.speed(tokens_per_s)
        if "expert_load" in cb_params:
            self.loads = cb_params.expert_load
        else:
            self.loads = self.read_and_reset_load()
        record["expert_load"] = {
            name: {"max": float(load.max()), "min": float(load.min()), "mean": float(load.mean())}
            for name, load in self.loads.items()
        }
        if self.monitors is not None:
            network, outputs = cb_params.train_network, cb_params.net_outputs
            record |= self.monitors.end(network, outputs, record["step"], self.loads, record.get("dropped_choices"))
        if cb_params.get("left_out"):
            record["left_out"] = cb_params.left_out
        else:
            self.stop_if_not_finite(record)
        self.records.append(record)
        if self.writes:
            self.write(record)
        if self.skipped_in_a_row > self.max_skipped_steps and "left_out" not in record:  # else bad_steps.py counts
            raise TrainingStopped(
                f"the gradients of {self.skipped_in_a_row} steps in a row were not finite, the last of step "
                f"{record['step']}, and the parameters stayed as they were: lower lr_schedule.learning_rate, look at "
                "the data, or allow more with TrainingMetrics' max_skipped_steps"
            )

    def losses(self, cb_params: Any) -> dict[str, float | None]:
        """The step's losses, gradient norm and learning rate, from the wrapper's output and the model."""
        # A pipeline's loss is a sum, of one stage: the parts tell more.
        _, _, _, lr, grad_norm = cb_params.net_outputs[:5]
        skipped = was_left_out(cb_params.train_network, cb_params.net_outputs)
        self.overflows += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        main, mtp, balance, *indexer = take_loss_parts(self.model)
        dropped = take_dropped(self.model)
        return {
            **({} if dropped is None else {"dropped_choices": dropped}),
            "loss": total_loss(self.model, main, mtp, balance, *indexer),
            "main_loss": main,
            "mtp_loss": mtp,
            "balance_loss": balance,
            **({"indexer_loss": indexer[0]} if indexer else {}),
            "grad_norm": as_float(grad_norm),
            "lr": as_float(lr),
        }

    def speed(self, tokens_per_s: float) -> dict[str, float]:
        """Tokens per second of all devices, TFLOP/s of one, and the share of its peak (facts 16)."""
        tflops = tokens_per_s * self.flops_per_token / self.devices / 1e12
        return {"tokens_per_s": tokens_per_s, "tflops_per_device": tflops, "mfu": tflops / self.peak_tflops}

    def read_and_reset_load(self) -> dict[str, np.ndarray]:
        """The loads of a run without TopkBiasBalanceCallback, which would have reset the counters."""
        loads = read_expert_load(self.model)
        reset_expert_load(self.model)
        return loads

    def stop_if_not_finite(self, record: dict[str, Any]) -> None:
        """Raise TrainingStopped when the loss is NaN or infinite."""
        if record["loss"] is None or math.isfinite(record["loss"]):
            return
        last = f"{self.records[-1]['loss']:.4f} at step {self.records[-1]['step']}" if self.records else "none"
        raise TrainingStopped(
            f"the loss is {record['loss']} at step {record['step']} (last finite loss: {last}); parameters were left "
            f"as they were: lower lr_schedule.learning_rate (now {record['lr']}) or resume from the last checkpoint"
        )

    def write(self, record: dict[str, Any]) -> None:
        """Append the record to metrics.jsonl and TensorBoard, and log it."""
        with naming(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(strict(record), allow_nan=False) + "\n")
        for key, value in scalars({key: record[key] for key in record.keys() - NOT_DRAWN}):
            self.tensorboard.add_scalar(key if "/" in key else f"training/{key}", value, record["step"])
        for layer, load in record["expert_load"].items():
            for key, value in load.items():
                self.tensorboard.add_scalar(f"expert_load_{key}/{layer}", value, record["step"])
        if record["step"] % self.per_print_times == 0 or len(self.records) == 1:
            logger.info(line(record))

    def on_train_end(self, run_context: RunContext) -> None:
        """Close the files, draw the plot and print the summary."""
        if not self.writes or not self.records:
            return
        self.tensorboard.close()
        records = whole_records(self.metrics_path)
        plot(records, self.loads, self.folder / "training.png")
        text = self.summary(records)
        write_text(self.folder / "summary.txt", text)
        print(text, flush=True)

    def summary(self, records: list[dict[str, Any]]) -> str:
        """First and last losses, the median speed after the first step, and where everything is."""
        first, last = records[0], records[-1]
        timed = self.records[1:] or self.records
        speed = {key: statistics.median(r[key] for r in timed) for key in ("tokens_per_s", "tflops_per_device", "mfu")}
        rows = [f"{'':14}{'first (step ' + str(first['step']) + ')':>20}{'last (step ' + str(last['step']) + ')':>20}"]
        for key in (*SUMMARIZED, *(["indexer_loss"] if "indexer_loss" in first else [])):
            rows.append(f"{key:14}{number(first[key]):>20}{number(last[key]):>20}")
        rows += [
            f"tokens/s      {speed['tokens_per_s']:,.0f} (median after the first step)",
            f"MFU           {speed['mfu']:.2%} = {speed['tflops_per_device']:.4f} of {self.peak_tflops:.4f} TFLOP/s "
            f"({self.peak_source}), {self.devices} device(s)",
            f"overflows     {self.overflows} steps left out",
            f"checkpoint    {self.folder / 'checkpoint'}",
            f"metrics       {self.metrics_path}",
            f"TensorBoard   {self.tensorboard_dir}",
            f"plot          {self.folder / 'training.png'}",
        ]
        return "\n".join(["Training summary", *rows]) + "\n"


NOT_DRAWN = {"step", "expert_load", "left_out"}  # as scalars of their own


def scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a record by name, those of nested ones by "outer/inner"."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif value is not None and math.isfinite(value):
            yield prefix + key, value


def strict(value: Any) -> Any:
    """A record for strict JSON, which has no NaN and no infinity: null in their place."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    """A loss for the summary table."""
    return "-" if value is None else f"{value:.4f}"


def line(record: dict[str, Any]) -> str:
    """The log line of a step."""
    loads = record["expert_load"].values()
    worst = max((load["max"] / load["mean"] for load in loads if load["mean"]), default=0.0)
    return (
        f"step {record['step']}, loss {number(record['loss'])}, main {number(record['main_loss'])}, "
        f"mtp {number(record['mtp_loss'])}, balance {number(record['balance_loss'])}, "
        + (f"indexer {number(record['indexer_loss'])}, " if "indexer_loss" in record else "")
        + f"grad norm {number(record['grad_norm'])}, lr {record['lr'] or 0:.3e}, "
        f"{record['tokens_per_s']:,.0f} tokens/s, {record['tflops_per_device']:.4f} TFLOP/s per device, "
        f"MFU {record['mfu']:.2%}, expert load max/mean {worst:.2f}"
        + (f", {record['dropped_choices']} choices dropped" if "dropped_choices" in record else "")
    )


def plot(records: list[dict[str, Any]], loads: dict[str, np.ndarray], path: Path) -> None:
    """Draw the losses, the balance of the loads over time and the last loads of every layer into a PNG."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(16, 4.5), layout="constrained")
    steps = [record["step"] for record in records]
    for key, label in (("main_loss", "main"), ("mtp_loss", "MTP"), ("loss", "total")):
        left.plot(steps, [np.nan if record[key] is None else record[key] for record in records], label=label)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    left.legend()
    for layer in records[-1]["expert_load"]:
        ratios = [r["expert_load"].get(layer, {"max": np.nan, "mean": 1}) for r in records]
        middle.plot(steps, [r["max"] / max(r["mean"], 1e-9) for r in ratios], label=layer)
    middle.set(xlabel="step", ylabel="max / mean tokens per expert", title="Expert balance")
    middle.set_ylim(bottom=0)
    if loads:
        middle.legend(fontsize="small")
        image = right.imshow(np.stack([load / max(load.mean(), 1e-9) for load in loads.values()]), aspect="auto")
        right.set_yticks(range(len(loads)), list(loads), fontsize="small")
        figure.colorbar(image, ax=right, label="tokens / mean")
    right.set(xlabel="expert", title="Expert load of the last step")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=100)
    pyplot.close(figure)
