"""What a training looks like from inside, at intervals: norms by parameter and layer, the experts, the time of a step.

Takes the place of `local_norm_format`, `optimizer_state_format` and `weight_state_format` of MindFormers 1.9.0's
TrainingStateMonitor, which need operators of Ascend and another graph. Here the graph stays as it is: a gradient is
found in what a step made of the optimizer's first moment. It can go when upstream's monitors run on CPU.
"""

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from mindspore import Tensor, nn
from mindspore.train import Callback, RunContext

from mindformers_ext.config.sections import Monitors
from mindformers_ext.sharded_checkpoint.copies import Copies
from mindformers_ext.sharded_checkpoint.network import pieces_of
from mindformers_ext.sharded_checkpoint.shards import FIRST_MOMENTS
from mindformers_ext.training.muon import MOMENTUM
from mindformers_ext.training.over_ranks import reduce_over_ranks
from mindformers_ext.training.wrapper import CLIP_EPSILON, as_numpy, real_model, was_left_out

SECOND_MOMENT = "adam_v."
BLOCK = 1 << 16  # values
LAYER = re.compile(r"(?:^|\.)((?:layers|mtp)\.\d+)\.")


class RunMonitors:
    """Looks at the steps whose number is a multiple of each monitor's interval."""

    def __init__(self, intervals: Monitors):
        self.intervals = intervals
        self.copies = Copies()
        self.before: dict[str, np.ndarray] = {}  # what this rank held before the step, where a monitor compares
        self.began = self.ended = time.perf_counter()

    def due(self, name: str, step: int) -> bool:
        """True when a monitor looks at this step."""
        interval = getattr(self.intervals, name)
        return interval is not None and step % interval == 0

    def begin(self, network: nn.Cell, step: int) -> None:
        """Before the step: keep a copy of what it will change."""
        gradients, updates = self.due("gradient_norms", step), self.due("update_norms", step)
        if gradients or updates:
            weights = {weight.name for weight in network.optimizer.parameters}
            compared = {
                name: array
                for name, array in own(network)
                if (gradients and name.startswith(FIRST_MOMENTS)) or (updates and name in weights)
            }
            self.before = self.copies.take(compared)
        self.began = time.perf_counter()

    def end(
        self, network: nn.Cell, outputs: tuple, step: int, loads: Mapping[str, np.ndarray], dropped: int | None
    ) -> dict[str, Any]:
        """After the step: what the monitors found, for its record."""
        now = time.perf_counter()
        found: dict[str, Any] = {}
        if self.due("times", step):
            found["seconds"] = {"step": now - self.began, "between_steps": self.began - self.ended}
        if self.due("experts", step):
            found["experts"] = {layer: of_experts(load) for layer, load in loads.items()}
            if dropped is not None:
                found["experts"]["drop_rate"] = dropped / max(sum(float(load.sum()) for load in loads.values()), 1.0)
        if self.due("attention_logits", step):
            largest = {layer: logits.asnumpy().max() for layer, logits in real_model(network).attention_logits()}
            over_ranks = reduce_over_ranks(np.array(list(largest.values()), np.float32), "max")
            found["attention_logits"] = {layer: float(v) for layer, v in zip(largest, over_ranks, strict=True)}
        weights = {weight.name for weight in network.optimizer.parameters}
        arrays = dict(own(network)) if self.norms_are_due(step) else {}
        if self.due("gradient_norms", step) and not was_left_out(network, outputs):
            found["gradient_norms"] = norms(weights, dict(gradients(network, outputs, arrays, self.before)))
        if self.due("weight_norms", step):
            found["weight_norms"] = norms(weights, {n: partial(square, arrays[n]) for n in weights & arrays.keys()})
        if self.due("update_norms", step):
            changed = {n: partial(square, arrays[n], self.before[n]) for n in weights & self.before.keys()}
            found["update_norms"] = norms(weights, changed)
        if self.due("moment_norms", step):
            for order, prefixes in (("first", FIRST_MOMENTS), ("second", (SECOND_MOMENT,))):
                moments = {name: partial(square, array) for name, array in of_weights(arrays, prefixes)}
                found[f"{order}_moment_norms"] = norms(weights, moments)
        self.before = {}
        self.ended = time.perf_counter()
        return found

    def norms_are_due(self, step: int) -> bool:
        """True when a monitor reads weights or moments."""
        return any(self.due(n, step) for n in ("gradient_norms", "weight_norms", "update_norms", "moment_norms"))


class ForgetLogits(Callback):
    """Let the largest attention logits be those of one step."""

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Begin anew."""
        for _, logits in real_model(run_context.original_args().train_network).attention_logits():
            logits.set_data(Tensor(np.full(logits.shape, -np.inf, np.float32)))


def own(network: nn.Cell) -> Iterator[tuple[str, np.ndarray]]:
    """What this rank holds and no rank before it; on CPU the arrays share the parameters' memory."""
    return ((name, piece.array) for name, piece in pieces_of(network).items() if piece.slot.copy == 0)


def of_weights(arrays: Mapping[str, np.ndarray], prefixes: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """The states with such a prefix, by their weights' names."""
    return ((name.partition(".")[2], array) for name, array in arrays.items() if name.startswith(prefixes))


def gradients(
    network: nn.Cell, outputs: tuple, arrays: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, Callable[[], float]]]:
    """What finds the squares of the step's gradients before clipping, from m = b m + (1 - b) g."""
    optimizer = network.optimizer
    norm = as_numpy(outputs[4])
    clip = 1.0
    if norm is not None:
        largest = float(as_numpy(network.clip_grad_norm.clip_norm).item())
        clip = min(1.0, largest / (max(float(norm.item()), largest) + CLIP_EPSILON))
    for name, array in of_weights(arrays, FIRST_MOMENTS):
        prefix, old = next((prefix, before[prefix + name]) for prefix in FIRST_MOMENTS if prefix + name in before)
        beta = optimizer.momentum if prefix == MOMENTUM else float(as_numpy(optimizer.beta1).item())
        yield name, partial(square, array, old, beta, (1 - beta) * clip)


def square(array: np.ndarray, old: np.ndarray | None = None, factor: float = 1.0, unit: float = 1.0) -> float:
    """The sum of the squares of `(array - factor * old) / unit`, a block at a time, which stays in the cache."""
    flat, total = array.reshape(-1), 0.0
    for begin in range(0, flat.size, BLOCK):
        block = flat[begin : begin + BLOCK].astype(np.float32, copy=False)
        if old is not None:
            block = block - np.float32(factor) * old.reshape(-1)[begin : begin + BLOCK].astype(np.float32, copy=False)
        total += float(np.dot(block, block))
    return total / unit**2


def norms(names: set[str], own: Mapping[str, Callable[[], float]]) -> dict[str, Any]:
    """The Euclidean norm of every parameter, of every layer and of all, over all ranks; `own` finds the squares."""
    places = {name: place for place, name in enumerate(sorted(names))}
    squares = np.zeros(len(places), np.float32)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, value in zip(own, pool.map(lambda name: own[name](), own), strict=True):
            squares[places[name]] = value
    squares = reduce_over_ranks(squares, "sum").astype(np.float64)
    layers: dict[str, float] = {}
    for name, place in places.items():
        layer = LAYER.search(name)
        if layer:
            layers[layer[1]] = layers.get(layer[1], 0.0) + squares[place]
    return {
        "all": float(np.sqrt(squares.sum())),
        "layers": {layer: float(np.sqrt(square)) for layer, square in layers.items()},
        "parameters": {name: float(np.sqrt(squares[place])) for name, place in places.items()},
    }


def of_experts(load: np.ndarray) -> dict[str, float]:
    """Entropy of how the tokens are spread over the experts, 1 where evenly, and experts without a token."""
    shares = load[load > 0] / max(load.sum(), 1)
    entropy = -float((shares * np.log(shares)).sum()) / np.log(max(len(load), 2))
    return {"entropy": float(entropy), "dead": int((load == 0).sum())}
