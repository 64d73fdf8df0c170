"""Our graph of DeepSeek-V3 beside MindFormers' own: python benchmarks/graph/against_mindformers.py

Compiles one rank of each for Ascend, without a card, memory plan included: hidden 7168, 128 heads, 256 experts, four
layers and MTP, sequence 4096, bfloat16, everything recomputed, the first rank of the last stage. Ours is the 671B YAML,
MindFormers' the 671B YAML of its wheel, both with our YAML's graph_kernel_flags (what these join is counted so, and
held against the execution order). Counted for one micro-batch: products and attention at 60 % of 354 TFLOP/s,
other operators by bytes at 1.6 TB/s (rank_compiler/roofline.py), collectives at 70 % of the links of an Atlas 800T A2.
What was compiled is kept in --out, and read again unless --again.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mindformers_ext.config.yaml_files import load_yaml  # noqa: E402
from mindformers_ext.dryrun.rooflines import roofline_record  # noqa: E402
from mindformers_ext.dryrun.terminal_report import table  # noqa: E402
from mindformers_ext.dryrun.transfers import wire_factor  # noqa: E402
from mindformers_ext.files.atomic import write_json, write_text  # noqa: E402
from mindformers_ext.rank_compiler import mindir  # noqa: E402
from mindformers_ext.rank_compiler.operator_rules import distinct_uses  # noqa: E402
from mindformers_ext.rank_compiler.rank_pool import COMPILED, RankJobs, compile_ranks  # noqa: E402
from mindformers_ext.rank_compiler.roofline import ATTENTION, MEMORY, PRODUCT, count_operators  # noqa: E402
from mindformers_ext.rank_compiler.stand_in_cann import MEMORY as PLAN_MEMORY  # noqa: E402
from mindformers_ext.training.start import GRAPH_KERNEL_FLAGS  # noqa: E402

OUR_YAML = ROOT / "research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml"
THEIR_YAML = Path(find_spec("mindformers").origin).parents[1] / "configs/deepseek3/pretrain_deepseek3_671b.yaml"
MICRO_BATCHES = 2  # of the compiled step; the fewest that keep one apart from what runs once a step
SEQUENCE, CHOSEN, HIDDEN = 4096, 8, 7168
OURS, THEIRS = "ours", "MindFormers'"
RATES = SimpleNamespace(peak_tflops=354, matmul_efficiency=0.6, attention_efficiency=0.6, hbm_gb_per_s=1600)
NODE, LINK_BYTES_PER_S, ACROSS_BYTES_PER_S, LATENCY_S = 8, 0.7 * 28e9, 0.7 * 25e9, 25e-6


@dataclass(frozen=True)
class Layout:
    """Degrees of both models, and what of ours is chosen for them."""

    dp: int
    mp: int
    pp: int
    ep: int
    ours: tuple[tuple[str, Any], ...] = ()

    @property
    def stage(self) -> int:
        return self.dp * self.mp

    @property
    def world(self) -> int:
        return self.stage * self.pp

    def __str__(self) -> str:
        return f"dp{self.dp} mp{self.mp} ep{self.ep} pp{self.pp}"


ACROSS = (  # what docs/experts.md advises beyond a server
    ("moe_config.moe_token_dispatcher_type", "alltoall_deredundency"),
    ("moe_config.npu_nums_per_device", NODE),
)
LAYOUTS = {"pp2": Layout(4, 4, 2, 8), "pp1": Layout(4, 4, 1, 8), "ep32": Layout(8, 4, 2, 32, ACROSS)}
FLAGS = load_yaml(OUR_YAML)["context"]["graph_kernel_flags"]  # for both
JOINED = re.compile(r"Inplace\w*Mat[Mm]ulAdd")
MEMORY_LIMIT = {"context.max_device_memory": "200GB", "context.mempool_block_size": "200GB"}


def degrees(layout: Layout, micro_batches: int) -> dict[str, Any]:
    """Keys that both YAMLs have."""
    accumulation = {"runner_config.gradient_accumulation_steps": micro_batches} if layout.pp == 1 else {}
    return (
        MEMORY_LIMIT
        | accumulation
        | {
            "parallel_config.data_parallel": layout.dp,
            "parallel_config.model_parallel": layout.mp,
            "parallel_config.pipeline_stage": layout.pp,
            "parallel_config.expert_parallel": layout.ep,
            "parallel_config.micro_batch_num": 1 if accumulation else micro_batches,
            "model.model_config.offset": 0,
        }
    )


def our_job(layout: Layout, micro_batches: int) -> tuple[str, list[str]]:
    """Module and arguments that compile our model."""
    overrides = (
        degrees(layout, micro_batches)
        | dict(layout.ours)
        | {
            "model.model_config.num_layers": 4,
            "moe_config.first_k_dense_replace": 1,
            "recompute_config.recompute": True,
            "parallel.dataset_strategy": [[layout.dp, 1]] * 4,
        }
    )
    arguments = ["--samples", str(layout.dp * micro_batches), "--config", str(OUR_YAML)]
    arguments += ["--register_path", str(ROOT / "research/deepseek3")]
    arguments += [text for key, value in overrides.items() for text in (f"--{key}", json.dumps(value))]
    return "mindformers_ext.rank_compiler.compile_run", arguments


def their_job(layout: Layout, micro_batches: int) -> tuple[str, list[str]]:
    """Module and arguments that compile MindFormers' model: its YAML, without what only its own layout can have."""
    overrides = degrees(layout, micro_batches) | {
        "model.model_config.num_hidden_layers": 4,
        "model.model_config.first_k_dense_replace": 1,
        "model.model_config.pp_interleave_num": 1,
        "parallel.pipeline_config": {"pipeline_interleave": False, "pipeline_scheduler": "1f1b"},
        "parallel.parallel_optimizer_config.optimizer_weight_shard_size": -1,
    }
    return "benchmarks.graph.mindformers_own", ["--config", str(THEIR_YAML), "--overrides", json.dumps(overrides)]


JOBS = {OURS: our_job, THEIRS: their_job}


def compiled(name: str, who: str, out: Path, again: bool, micro_batches: int) -> tuple[Path, dict[str, Any]]:
    """(graph, planned memory) of one rank; compiled unless that was done before."""
    layout = LAYOUTS[name]
    asked = json.loads(json.dumps(asdict(layout if who == OURS else replace(layout, ours=()))))
    folder = out / f"{name}_{who.rstrip(chr(39))}{micro_batches if micro_batches != MICRO_BATCHES else ''}"
    rank = layout.world - layout.stage
    kept = folder / "result.json"
    if again or not kept.exists():
        module, arguments = JOBS[who](layout, micro_batches)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = RankJobs(
            module=module,
            arguments=lambda rank_folder: ["--out", str(rank_folder), *arguments],
            world_size=layout.world,
            devices_per_stage=layout.stage,
            out=folder,
            level=PLAN_MEMORY,
            python_path=(str(ROOT),),
        )
        (result,) = compile_ranks(jobs, [rank], 1)
        if result.status != COMPILED:
            raise SystemExit(f"error: {name}, {who}: {result.message}; log: {result.log}")
        write_json(kept, {"memory": result.memory, "seconds": result.seconds, "layout": asked})
    record = json.loads(kept.read_text())
    if record["layout"] != asked:
        raise SystemExit(f"error: {kept} is of another layout, {record['layout']}; compile it with --again")
    return folder / f"rank_{rank}" / "graph.mindir", record["memory"]


def counted(layout: Layout, graph: Path, micro_batches: int) -> dict[str, float]:
    """One micro-batch of a compiled rank: milliseconds, bytes and kernels.

    Where the compiler writes every micro-batch out, what runs once a step is among them.
    """
    model = mindir.load_model(graph.read_bytes())
    rows = SEQUENCE // layout.mp * CHOSEN
    works = [work.balanced(rows) for work in count_operators(model, FLAGS)]
    joined = sum(work.count for work in works if JOINED.fullmatch(work.operator))
    (order,) = graph.parent.rglob("execute_order.csv")
    run = len(re.findall(rf"/{JOINED.pattern}-op", order.read_text(), re.IGNORECASE))
    if joined != run:
        raise SystemExit(
            f"error: {graph}: {joined} products are counted as adding to their buffers, {order} runs {run}"
        )
    roofline = roofline_record(works, RATES, rows, micro_batches)
    kinds = {kind: seconds * 1e3 for kind, seconds in roofline["seconds_by_kind"].items()}
    experts = [w for w in works if w.repeated and w.kind == MEMORY and moves_choices(w, rows)]
    found = {
        "products and attention ms": kinds[PRODUCT] + kinds[ATTENTION],
        "other operators GB": roofline["memory_bytes"] / 1e9,
        "other operators ms": kinds[MEMORY],
        "of it dispatch and experts ms": sum(w.seconds(RATES) * w.count for w in experts) / micro_batches * 1e3,
        "fusion could take ms": roofline["fusion_seconds"] * 1e3,
    }
    traffic = collective_times(layout, model, micro_batches)
    found |= traffic
    found["all ms"] = sum(found[k] for k in ("products and attention ms", "other operators ms", *traffic) if "ms" in k)
    return found | {"kernels": roofline["kernels"]}


def moves_choices(work, rows: int) -> bool:
    """True for what handles a row for each choice of an expert: named so by our cells, or told by its shapes.

    MindFormers runs dispatch and experts inside of one operator, whose parts have lost the names of their cells.
    """
    if work.part in ("experts", "dispatch"):
        return True
    chosen = (f"({rows}, {HIDDEN})", f"(1, {rows // CHOSEN}, {CHOSEN}, {HIDDEN})")
    return work.part != "gradient accumulation" and any(shape in work.shapes for shape in chosen)


def collective_times(layout: Layout, model, micro_batches: int) -> dict[str, float]:
    """MiB and milliseconds of the collectives of a micro-batch, between stages excepted, when nothing hides them."""
    rank = layout.world - layout.stage
    repeated = Counter({f: times for f, times in mindir.call_counts(model).items() if times > 1})
    named = ("tensor parallel MiB", "tensor parallel ms", "expert parallel MiB", "expert parallel ms")
    found = Counter(dict.fromkeys(named, 0.0))
    for c in mindir.collectives(model, rank, layout.world, repeated):
        if c.kind in ("Send", "Receive"):
            continue
        purpose, calls = purpose_of(c.ranks, layout), c.count / micro_batches
        across = len({member // NODE for member in c.ranks}) > 1
        rate = ACROSS_BYTES_PER_S if across else LINK_BYTES_PER_S * max(len(c.ranks) - 1, 1)
        size = balanced_bytes(c.dtype, SEQUENCE // layout.mp * CHOSEN) if c.bytes is None else c.bytes
        wire = size * wire_factor(c.kind, len(c.ranks))
        found[f"{purpose} ms"] += calls * (wire / rate + LATENCY_S) * 1e3
        if f"{purpose} MiB" in found:
            found[f"{purpose} MiB"] += calls * size / 2**20
    return dict(found)


def balanced_bytes(dtype: str, rows: int) -> float:
    """Of an exchange whose size only the device knows: hidden states in the compute type, or a number for each row."""
    return rows * HIDDEN * 2 if dtype == "bfloat16" else rows * 4


def purpose_of(ranks: tuple[int, ...], layout: Layout) -> str:
    """What a group of ranks is for, by its place."""
    if len({rank // layout.mp for rank in ranks}) == 1:
        return "tensor parallel"
    spread = len(ranks) > 1 and ranks[1] - ranks[0] == layout.mp and len(ranks) == layout.dp
    inside = len({rank // layout.ep for rank in ranks}) == 1
    return "expert parallel" if inside and not spread else "other collectives"


def show(name: str, found: dict[str, dict[str, float]], memory: dict[str, dict[str, int]]) -> None:
    """One layout's table, and its ratio."""
    ours, theirs = found[OURS], found[THEIRS]
    rows = [[key, f"{ours[key]:,.1f}", f"{theirs[key]:,.1f}"] for key in ours if key in theirs]
    peaks = {who: plan["used_peak_bytes"] / 1e6 for who, plan in memory.items()}
    rows.append(["planned peak MB", *(f"{peaks[who]:,.0f}" for who in (OURS, THEIRS))])
    print(f"\n{name}: {LAYOUTS[name]}, one rank, one micro-batch\n{table(['', OURS, THEIRS], rows)}")
    print(
        f"ratio {ours['all ms'] / theirs['all ms']:.3f} at {name}; planned peak {peaks[OURS] / peaks[THEIRS]:.3f}; "
        f"kernels {ours['kernels']:,.0f} against {theirs['kernels']:,.0f}",
        flush=True,
    )


def write_signatures(graphs: list[Path]) -> None:
    """What MindFormers' graphs run, for the audit's column "in MindFormers'"."""
    found = set()
    for graph in graphs:
        uses = distinct_uses(mindir.load_model(graph.read_bytes()))
        found |= {(o.name, o.attributes(), o.dtypes()) for o, _, _ in uses}
    lines = ["\t".join(signature) for signature in sorted(found)]
    write_text(SIGNATURES, "\n".join([SIGNATURES_HEAD, *lines, ""]))
    print(f"{len(found)} signatures: {SIGNATURES}")


SIGNATURES = ROOT / "mindformers_ext/rank_compiler/mindformers_signatures.tsv"
SIGNATURES_HEAD = """\
# Operator, attributes and types of all that MindFormers 1.9.0's own DeepSeek-V3 runs, compiled by MindSpore 2.9.0.
# Made by: python benchmarks/graph/against_mindformers.py --write_signatures"""


def main() -> None:
    """Print a table for each layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "output/graph", help="folder for what is compiled")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--again", nargs="*", choices=JOBS, default=[], help="compile these anew")
    parser.add_argument("--write_signatures", action="store_true", help=f"write {SIGNATURES.name} anew")
    options = parser.parse_args()
    os.environ[GRAPH_KERNEL_FLAGS] = FLAGS
    graphs = []
    for name in options.layouts:
        layout, number = LAYOUTS[name], MICRO_BATCHES
        both = {who: compiled(name, who, options.out, who in options.again, number) for who in JOBS}
        found = {who: counted(layout, graph, number) for who, (graph, _) in both.items()}
        if layout.pp == 1:  # ours is written out: one micro-batch more, less those before
            graph, _ = compiled(name, OURS, options.out, OURS in options.again, number + 1)
            more = counted(layout, graph, number + 1)
            found[OURS] = {key: (number + 1) * more[key] - number * value for key, value in found[OURS].items()}
        show(name, found, {who: memory for who, (_, memory) in both.items()})
        graphs.append(both[THEIRS][0])
    if options.write_signatures:
        write_signatures(graphs)


if __name__ == "__main__":
    main()
