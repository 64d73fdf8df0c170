"""Loss and perplexity of an evaluation set: of a run_mode eval, and every few steps of a training.

Takes the place of `do_eval` of MindFormers 1.9.0, whose EvalCallBack needs metrics that know nothing of this model. A
training evaluates its checkpoint as run_mode eval does: ranks on CPU hold parts of the weights only, and the first of
them reads the checkpoint that all have just written.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindformers.tools.logger import logger
from mindformers.tools.utils import get_output_root_path
from mindspore import Tensor, nn
from mindspore.train import Callback, RunContext

from mindformers_ext.bin_dataset.blended_dataset import BlendedDataset, Dataset
from mindformers_ext.bin_dataset.sample_order import LeftOut
from mindformers_ext.collectives.rank_job import is_cpu_rank
from mindformers_ext.config.data_check import read_loader
from mindformers_ext.config.run import Run
from mindformers_ext.data.data_position import start_of
from mindformers_ext.errors import ConfigError
from mindformers_ext.files.atomic import naming, write_text
from mindformers_ext.sharded_checkpoint.reader import open_source
from mindformers_ext.sharded_checkpoint.writer import BEST, step_name
from mindformers_ext.training.checkpoint_monitor import CheckpointMonitor, load_weights
from mindformers_ext.training.metrics import keep_lines_until
from mindformers_ext.training.over_ranks import place_in_run
from mindformers_ext.training.topk_bias_callback import reset_expert_load
from mindformers_ext.training.wrapper import real_model

RESULTS = "eval.jsonl"  # in output_dir: one object an evaluation


def forward_logits(network: nn.Cell, tokens: np.ndarray, *packing: np.ndarray) -> np.ndarray:
    """Logits (B, S, V) float32 of tokens (B, S); `packing` are position_ids and actual_seq_len of packed rows."""
    more = dict(zip(("position_ids", "actual_seq_len"), map(Tensor, packing), strict=False))
    output = network(Tensor(tokens.astype(np.int32)), **more)
    logits = output[0] if isinstance(output, tuple) else output
    return logits.asnumpy().astype(np.float32).reshape(*tokens.shape, -1)


def cross_entropy_sums(logits: np.ndarray, labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Sum of -log p(label) in nats over the positions of each sample where mask (B, S) is 1: (B,)."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(shifted, dtype=np.float64).sum(-1))
    chosen = np.take_along_axis(shifted, labels[..., None].astype(np.int64), -1)[..., 0]
    return ((log_z - chosen) * mask).sum(1)


@dataclass(frozen=True)
class EvaluationSet:
    """Samples of Megatron files, in batches.

    Args:
        places: of the samples that are read, in the order of the data.
        whole: without a last batch that is smaller.
    """

    dataset: Dataset
    places: np.ndarray
    batch: int
    whole: bool

    @classmethod
    def of(cls, run: Run) -> "EvaluationSet":
        """The run's eval_dataset.

        Raises:
            ConfigError: it cannot be read, or has no batch.
        """
        asked, left_out = read_loader(run, "eval_dataset"), run.value("eval_dataset.data_loader.leave_out") or ()
        try:
            dataset = asked.build()
            order = LeftOut(left_out, asked.size_of(len(dataset)))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{run.path}: eval_dataset.data_loader: {error}") from None
        whole = run.value("eval_dataset.drop_remainder") is not False
        if order.kept < (run.batch_size if whole else 1):
            raise ConfigError(f"{run.path}: eval_dataset gives no full batch of {run.batch_size} samples")
        return cls(dataset, order.places(np.arange(order.kept)), run.batch_size, whole)

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns of every batch."""
        for begin in range(0, len(self.places) - (self.batch - 1 if self.whole else 0), self.batch):
            yield self.dataset.batch(self.places[begin : begin + self.batch])

    def sources(self) -> dict[str, np.ndarray]:
        """Which samples are of each part of a blend; {} for one file."""
        if not isinstance(self.dataset, BlendedDataset) or len(self.dataset.datasets) == 1:
            return {}
        owner = self.dataset.dataset_index[self.places]
        return {str(part.indexed.prefix): owner == i for i, part in enumerate(self.dataset.datasets)}


def loss_of(
    network: nn.Cell, batches: Iterable[Mapping[str, np.ndarray]], sources: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Loss (nats per token), perplexity and tokens of all batches, and of each source; {} without any."""
    sums, counts = [], []
    for batch in batches:
        mask = batch.get("loss_mask", np.ones_like(batch["labels"])).astype(np.float64)
        sums.append(cross_entropy_sums(forward_logits(network, batch["input_ids"]), batch["labels"], mask))
        counts.append(mask.sum(1))
    if not sums or not np.sum(counts):
        return {}
    total, count = np.concatenate(sums), np.concatenate(counts)
    result = summary(total, count)
    parts = {name: own[: len(total)] for name, own in sources.items()}
    if parts:
        result["sources"] = {name: summary(total[own], count[own]) for name, own in parts.items() if count[own].sum()}
    return result


def summary(sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Of some samples."""
    loss = float(sums.sum() / counts.sum())
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": float(counts.sum())}


def told(result: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say a result."""
    for name, part in [("", result), *result.get("sources", {}).items()]:
        words = f"loss {part['loss']:.4f}, perplexity {part['perplexity']:.2f} over {part['tokens']:,.0f} tokens"
        yield f"validation {words}" if not name else f"  of {name}: {words}"


class Evaluation(Callback):
    """Save a checkpoint every few steps and evaluate it; `best` in its folder names the one with the lowest loss.

    Runs after the CheckpointMonitor that it is given. The results are in eval.jsonl and the log.
    """

    def __init__(self, monitor: CheckpointMonitor, data: EvaluationSet, every: int):
        super().__init__()
        self.monitor, self.data, self.every = monitor, data, every
        self.path = Path(get_output_root_path()) / RESULTS

    def on_train_begin(self, run_context: RunContext) -> None:
        """Forget results of steps that come again."""
        if place_in_run()[0] == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_lines_until(self.path, start_of(run_context.original_args()).step)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Evaluate when it is due; the other ranks wait for the first one in their next step."""
        cb_params = run_context.original_args()
        step = start_of(cb_params).step + cb_params.cur_step_num
        if step % self.every:
            return
        if self.monitor.last_saved != step:
            self.monitor.save(cb_params, step)
        if place_in_run()[0]:
            return
        self.monitor.saver.wait()
        folder = self.monitor.saver.root / step_name(step)
        if not folder.exists():
            logger.warning("step %d is not evaluated: its checkpoint is not healthy", step)
            return
        model = real_model(cb_params.train_network)
        if is_cpu_rank():
            load_weights(model, open_source(folder))
        model.set_train(False)
        result = loss_of(model, self.data.batches(), self.data.sources())
        model.set_train(True)
        reset_expert_load(model)
        self.report(step, result)

    def report(self, step: int, result: dict[str, Any]) -> None:
        """Write and say it, and let `best` name the step when none was better."""
        before = [json.loads(line)["loss"] for line in self.path.read_text(encoding="utf-8").splitlines()]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **result}) + "\n")
        for line in told(result):
            logger.info("step %d: %s", step, line)
        if result["loss"] <= min(before, default=math.inf):
            write_text(self.monitor.saver.root / BEST, step_name(step), durable=True)
