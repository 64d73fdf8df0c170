"""Run operators one at a time: a process as reference in float32 on CPU, and one as the device that is tried.

    python -m mindformers_ext.first_hour.worker reference|device CPU|Ascend FOLDER GRAPH...   (operator_checks.py does)

Each line of the standard input is the number of a use (`one_operator.distinct_uses` of the graphs); the answer is a
JSON line. The reference leaves its results in FOLDER, where the device finds them. A crash ends this process only.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ext.first_hour.one_operator import (
    STATISTICS,
    Source,
    Use,
    as_cell,
    cut_out,
    distinct_uses,
    in_float32,
    input_arrays,
    roles_of,
)
from mindformers_ext.rank_compiler import mindir
from mindformers_ext.rank_compiler.operators import tensors

REFERENCE, DEVICE = "reference", "device"
# Largest difference over the largest number of a result. bfloat16 keeps 8 bits of a number, float16 11; sums of
# thousands of float32 numbers depend on their order.
TOLERANCES = {"bfloat16": 2e-2, "float16": 4e-3, "float": 2e-4, "double": 1e-9}
SAME = 0.99  # share of equal integers: of equal scores, any may be chosen first
MEASURED_S, MOST_RUNS = 0.2, 50
FORWARD = "FlashAttentionScore"
# Results that the documents define: attention's statistics are a device's own, gradients of tables are not asked for.
SAID = {FORWARD: slice(STATISTICS["attention_in"], None), "RotaryPositionEmbeddingGrad": slice(1)}
ATTENDED = ("query", "key", "value")


class Worker:
    """The graphs, read once, on one device."""

    def __init__(self, role: str, device: str, folder: Path, graphs: list[Path]):
        self.role, self.device, self.folder = role, device, folder
        self.uses = distinct_uses(graphs)
        self.sources = {path: Source(mindir.load_model(path.read_bytes())) for path in graphs}
        gc.collect()
        gc.freeze()  # MindSpore collects garbage in every compilation, and the graphs are many objects

    def answer(self, index: int) -> dict[str, Any]:
        """Try the use of this number."""
        use = self.uses[index]
        model = self._cut_out(use)
        arrays = input_arrays(use, model, seed=index)
        if any(array is None for array in arrays):
            arrays = self._with_statistics(use, model, arrays)
        cell, inputs = self._prepared(model, arrays)
        stored = self.folder / f"{index}.npz"
        if self.role == REFERENCE:
            np.savez(stored, *as_arrays(cell(*inputs)))
            return {}
        results, seconds = timed(cell, inputs)
        with np.load(stored) as file:
            wanted = [file[name] for name in file.files]
        kinds = [t.dtype for t in tensors(use.operator.result)]
        said = SAID.get(use.operator.name, slice(None))
        return {"seconds": seconds, **compared(results[said], wanted[said], kinds[said])}

    def _cut_out(self, use: Use):
        return cut_out(self.sources[use.graph], use.function, use.operator.output)

    def _prepared(self, model, arrays: Sequence[np.ndarray]) -> tuple[Any, list]:
        """A model as a cell of this worker's device and types, and its inputs as tensors."""
        import mindspore as ms

        if self.role == REFERENCE:
            model = in_float32(model)
        kinds = [mindspore_type(given.tensor[0].data_type) for given in model.graph.input]
        inputs = [ms.Tensor(array).astype(kind) for array, kind in zip(arrays, kinds, strict=True)]
        return as_cell(model, self.folder / f"{self.role}.mindir", self.device == "CPU"), inputs

    def _with_statistics(self, use: Use, model, arrays: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Attention's gradient with what the same device's forward pass leaves for it. Raises LookupError."""
        names = [roles_of(use.operator, model)[given.name] for given in model.graph.input]
        shapes = [use.operator.tensor(name).shape for name in ATTENDED]
        alike = (u for u in self.uses if u.operator.name == FORWARD)
        forward = next((u for u in alike if [u.operator.tensor(name).shape for name in ATTENDED] == shapes), None)
        if forward is None:
            raise LookupError(f"the graphs have no {FORWARD} of the same shapes")
        inner = self._cut_out(forward)
        known = dict(zip(names, arrays, strict=True))
        taken = [known[roles_of(forward.operator, inner)[given.name]] for given in inner.graph.input]
        cell, inputs = self._prepared(inner, taken)
        results = as_arrays(cell(*inputs))
        return [results[STATISTICS[name]] if array is None else array for name, array in known.items()]


def mindspore_type(data_type: int):
    """MindSpore's type of MindIR's."""
    import mindspore as ms

    name = mindir.pb.TensorProto.DataType.Name(data_type).lower()
    return getattr(ms, {"float": "float32", "double": "float64", "bool": "bool_"}.get(name, name))


def as_arrays(result) -> list[np.ndarray]:
    """The tensors of a result, nested or not; bfloat16 as float32."""
    import mindspore as ms

    if isinstance(result, (tuple, list)):
        return [array for part in result for array in as_arrays(part)]
    return [(result.astype(ms.float32) if result.dtype == ms.bfloat16 else result).asnumpy()]


def timed(cell, inputs: list) -> tuple[list[np.ndarray], float]:
    """The results, and the seconds of one run when many follow each other."""
    import mindspore as ms

    results = as_arrays(cell(*inputs))  # compiles
    ms.runtime.synchronize()
    start = time.perf_counter()
    cell(*inputs)
    ms.runtime.synchronize()
    runs = max(2, min(MOST_RUNS, int(MEASURED_S / max(time.perf_counter() - start, 1e-6))))
    start = time.perf_counter()
    for _ in range(runs):
        cell(*inputs)
    ms.runtime.synchronize()
    return results, (time.perf_counter() - start) / runs


def compared(results: list[np.ndarray], wanted: list[np.ndarray], kinds: list[str]) -> dict[str, Any]:
    """{agrees, error, tolerance} of the result that is furthest off."""
    worst: dict[str, Any] = {"agrees": True, "error": 0.0, "tolerance": 0.0}
    for result, want, kind in zip(results, wanted, kinds, strict=False):  # CPU leaves out attention's empty last one
        if result.shape != want.shape:
            return {"agrees": False, "error": f"shape {result.shape} in place of {want.shape}", "tolerance": 0.0}
        error, tolerance = difference(result, want, kind)
        if tolerance and error / tolerance >= worst["error"] / (worst["tolerance"] or 1):
            worst = {"agrees": bool(error <= tolerance), "error": float(error), "tolerance": tolerance}
    return worst


def difference(result: np.ndarray, want: np.ndarray, kind: str) -> tuple[float, float]:
    """(largest difference over the largest number, what it may be); of integers the share that differs."""
    if kind not in TOLERANCES:
        return (float(np.mean(result != want)) if want.size else 0.0), 1 - SAME
    if not want.size:
        return 0.0, TOLERANCES[kind]
    if not np.array_equal(np.isfinite(result), np.isfinite(want)):
        return float("inf"), TOLERANCES[kind]
    finite = np.isfinite(want)
    scale = max(float(np.abs(want[finite]).max(initial=0.0)), 1e-30)
    return float(np.abs(result[finite] - want[finite]).max(initial=0.0)) / scale, TOLERANCES[kind]


def first_words(error: Exception) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip(" -")), "")


def main() -> None:
    """Answer until the input ends; an operator that raises is an answer too."""
    role, device, folder, *graphs = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE, device_target=device)
    worker = Worker(role, device, Path(folder), [Path(graph) for graph in graphs])
    for line in sys.stdin:
        try:
            found = worker.answer(int(line))
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {first_words(error)}"}
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
