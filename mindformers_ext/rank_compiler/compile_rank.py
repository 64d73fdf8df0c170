"""Compile one training cell as one rank of an Ascend cluster and write down what the compiler decided.

Runs in a child process whose environment comes from `stand_in_cann.ascend_environment`::

    python -m mindformers_ext.rank_compiler.compile_rank --builder package.module:function \
        --arguments '{"pp": 2}' --out DIR

`function(**arguments)` sets the parallel context, builds the training cell and returns `(cell, inputs)`; device target
and communication are ready when it is called. Into DIR go

- `graph.mindir`: the rank's forward + backward + optimizer graph (protobuf `mindspore.train.mind_ir_pb2`),
- `compiled.json`: strategies, parameter layouts, FLOPs, seconds, peak memory of the compiler (see `compile_cell`),
- what the function that `--rewrite` names makes of the graph (of lowering/lower.py `cpu.mindir` and `calls.json`),
- `failure.json` instead of all, when the compiler refuses: exception, message, and the model's lines it names.
"""

import argparse
import contextlib
import gc
import importlib
import inspect
import json
import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindformers_ext.files.atomic import whole_file, write_json
from mindformers_ext.rank_compiler.stand_in_cann import MEMORY
from mindformers_ext.sharded_checkpoint.shards import LAYOUT_FIELDS
from mindformers_ext.training.start import GRAPH_KERNEL_FLAGS

RESULTS = ("graph.mindir", "compiled.json", "failure.json", "cpu.mindir", "calls.json")
# "In file /path/model.py:123, 4~9/    the code/" (or only the place), and Python's tracebacks, name the model's lines;
# "model.py:71~73" is the function around such a line.
SOURCE_LINE = re.compile(
    r"[Ii]n file ([^\s:,]+\.py):(\d+)(?!\d*~)(?:, [\d~]+/\s*(.*?)/\s*$)?|File \"([^\"]+\.py)\", line (\d+)",
    re.MULTILINE,
)
FRAMEWORK_PATH = re.compile(r"/site-packages/|/lib/python3|/mindformers_ext/dryrun/|<")


def compile_cell(cell, inputs: tuple, out: Path, values: bool = False, rewrite: str = "") -> dict[str, Any]:
    """Compile `cell(*inputs)` for this rank; write `graph.mindir` and `compiled.json` into `out`, return the latter.

    Parameters get values only when `values` is True. `rewrite` names a function that is called with
    `(out, graph, rank, device_num)` besides.

    Keys: rank, device_num, strategies {operator: one list per input}, layouts {parameter: LAYOUT_FIELDS},
    parameters {name: {shape, dtype, bytes}} as stored on this rank (weights, optimizer states, gradient buffers),
    weights (names of those that the optimizer updates), collectives (`mindir.Collective`), audit
    (`operator_rules.Finding`), operators (`roofline.Work`), flops {model, hardware} per step of this rank as MindSpore
    counts them, balanced_experts (see `assume_balanced`), compile_seconds, cpu_seconds and peak_rss_bytes of this
    process.
    """
    import mindspore as ms
    from mindspore.communication import get_group_size, get_process_group_ranks, get_rank
    from mindspore.graph.api import _cell_graph_executor

    from mindformers_ext.rank_compiler import mindir
    from mindformers_ext.rank_compiler.operator_rules import audit
    from mindformers_ext.rank_compiler.roofline import count_operators

    start = time.time()
    gc.freeze()  # MindSpore collects garbage often while it compiles: not among what is there already
    if not values:
        without_values(cell)
    balanced = False
    if int(os.environ["MS_SIMULATION_LEVEL"]) >= MEMORY:
        without_branch(cell)
        balanced = assume_balanced(cell)
    cell.compile(*inputs)
    seconds = time.time() - start
    phase = compiled_phase(cell)
    graph = _cell_graph_executor._get_func_graph_proto(cell, phase, "mind_ir")
    model = mindir.load_model(graph)
    if mindir.correct_groups(model, get_process_group_ranks):
        graph = model.SerializeToString()
    with whole_file(out / "graph.mindir") as partial:
        partial.write_bytes(graph)
    rank, device_num = get_rank(), get_group_size()
    parameters = mindir.stored_parameters(model)
    _, _, *flops, _ = _cell_graph_executor.flops_collection(phase)  # (whole stage, this rank), then "shapes vary"
    compiled = {
        "rank": rank,
        "device_num": device_num,
        "strategies": _cell_graph_executor._get_shard_strategy(cell),
        "layouts": {n: dict(zip(LAYOUT_FIELDS, e, strict=True)) for n, e in cell.parameter_layout_dict.items()},
        "inputs": [list(value.shape) for value in inputs],
        "parameters": parameters,
        "weights": [p.name for p in cell.optimizer.parameters if p.name in parameters],
        "collectives": [asdict(c) for c in mindir.collectives(model, rank, device_num)],
        "audit": [asdict(f) for f in audit(model, cell_lines(cell), ms.get_context("deterministic") == "ON")],
        "operators": [asdict(work) for work in count_operators(model, os.environ.get(GRAPH_KERNEL_FLAGS, ""))],
        "flops": {"model": flops[0], "hardware": flops[1]},
        "balanced_experts": balanced,
        "compile_seconds": seconds,
        "cpu_seconds": time.process_time(),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    if rewrite:
        named(rewrite)(out, model, rank, device_num)
    write_json(out / "compiled.json", compiled)
    return compiled


def cell_lines(cell) -> dict[str, str]:
    """{class: "file:line"} of the `construct` of every cell of the model's own: MindIR names cells, but no lines."""
    codes = {type(c).__name__: inspect.unwrap(type(c).construct).__code__ for _, c in cell.cells_and_names()}
    lines = {name: f"{code.co_filename}:{code.co_firstlineno}" for name, code in codes.items()}
    return {name: line for name, line in lines.items() if not FRAMEWORK_PATH.search(line)}


def named(function: str) -> Callable:
    """The function of this name, "package.module:function"."""
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def without_values(cell) -> None:
    """Let the compiler give every parameter its rank's shape, but no value: those of a rank of V3 fill the memory.

    Extends: mindspore.parallel._utils (2.9.0), which fills all parameters during compilation unless told by
    `init_param`, and the optimizer's states always.
    """
    from mindspore.parallel import _utils

    for parameter in cell.get_parameters():
        parameter.init_param = True
    _utils._init_optimizer_state = lambda parameter, phase: None


def launch(cell, inputs: tuple) -> None:
    """At level memory, hand the compiled graph to MindSpore's backend: it plans the memory, and prints it at exit."""
    if int(os.environ["MS_SIMULATION_LEVEL"]) >= MEMORY:
        cell(*inputs)


def always(norm) -> bool:
    """In place of a training cell's `is_taken`: every step updates the weights."""
    return True


def without_branch(cell) -> None:
    """Take the branch "no update where the norm is not finite" out of a training cell, in place.

    MindSpore 2.9's simulated backend refuses a graph with a branch ("contains ConditionSwitch"). The branch holds the
    whole update, so the memory plan is that of a step which is taken.
    """
    if hasattr(cell, "is_taken") and not cell.optimizer_decides:
        cell.is_taken = always


def assume_balanced(cell) -> bool:
    """Give every buffer whose length a step decides the length it has when all experts have as many rows.

    Returns True when there is such a buffer.

    The plan of the memory needs lengths: it cannot be made of operators whose result says how long it is.
    """
    parts = [part for _, part in cell.cells_and_names() if hasattr(part, "assume_balanced")]
    for part in parts:
        part.assume_balanced()
    return bool(parts)


def compiled_phase(cell) -> str:
    """Name of the graph that `cell.compile` made."""
    (phase,) = cell.compile_cache or (cell.current_phase,)
    return phase


def peak_rss_bytes() -> int:
    """Largest resident memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_failure(error: BaseException) -> dict[str, Any]:
    """What went wrong, for the report: exception, message, and the model's own lines, the innermost first."""
    text = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    found = [(f"{a or c}:{b or d}", code) for a, b, code, c, d in SOURCE_LINE.findall(text)]
    found += [(f"{frame.filename}:{frame.lineno}", frame.line) for frame in reversed(frames)]
    places: dict[str, str] = {}
    for place, code in found:
        places[place] = places.get(place) or code
    own = [f"{place}: {code}" if code else place for place, code in places.items() if not FRAMEWORK_PATH.search(place)]
    return {"exception": type(error).__name__, "message": text, "source_lines": own}


def start_as_rank() -> tuple[int, int]:
    """Make this process a simulated Ascend rank (graph mode, communication ready); return (rank, device_num)."""
    import mindspore as ms
    from mindspore.communication import get_group_size, get_rank, init

    if "MS_SIMULATION_LEVEL" not in os.environ:
        raise RuntimeError("MS_SIMULATION_LEVEL is not set: start this process with ascend_environment(...)")
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("Ascend")
    init()
    return get_rank(), get_group_size()


def preload(argv: list[str]) -> None:
    """Import what `main(argv)` will; a builder that cannot be imported is for `main` to report."""
    import mindspore  # noqa: F401

    with contextlib.suppress(Exception):
        importlib.import_module(_parse(argv).builder.split(":")[0])


def main(argv: list[str] | None = None) -> int:
    """Compile what `--builder` returns; 0 when compiled, 1 when the builder or the compiler failed."""
    options = _parse(argv)
    return guarded(options.out, lambda: _compile_built(options))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builder", required=True, help="package.module:function, returns (cell, inputs)")
    parser.add_argument("--arguments", default="{}", type=json.loads, help="keyword arguments of the builder, JSON")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results")
    add_rewrite(parser)
    return parser.parse_args(argv)


def add_rewrite(parser: argparse.ArgumentParser) -> None:
    """The option of every program that compiles a rank."""
    parser.add_argument("--rewrite", default="", help="package.module:function that gets the graph (compile_cell)")


def guarded(out: Path, work) -> int:
    """Run `work()`; an exception becomes `failure.json` in `out`, its traceback the log, and the exit code 1."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in RESULTS:
        (out / stale).unlink(missing_ok=True)
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        write_json(out / "failure.json", describe_failure(error))
        return 1
    return 0


def _compile_built(options: argparse.Namespace) -> None:
    start_as_rank()
    cell, inputs = named(options.builder)(**options.arguments)
    compile_cell(cell, inputs, options.out, rewrite=options.rewrite)
    launch(cell, inputs)


if __name__ == "__main__":
    sys.exit(main())
