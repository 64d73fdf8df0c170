"""The least time of every operator of a compiled rank on a device, for the report (`rank_compiler/roofline.py`)."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from mindformers_ext.config.run import Run
from mindformers_ext.rank_compiler.roofline import ATTENTION, MEMORY, PRODUCT, VIEW, Rates, Work

KINDS = (PRODUCT, ATTENTION, MEMORY)
KEPT = 100  # operators in the report; a rank's compiled.json has all


def balanced_rows(plan: Run) -> float:
    """Rows of a rank's experts for one micro-batch when routing is balanced."""
    model = plan.model
    tokens = plan.batch_size * model.seq_length / (plan.cp * plan.mp)
    return tokens * model.moe_config.num_experts_chosen if model.moe_config.expert_num > 1 else 0


def roofline_record(works: list[Work], rates: Rates, rows: float, micro_batches: int) -> dict[str, Any]:
    """A micro-batch of a rank without its collectives: seconds and bytes by kind, part of the model and operator.

    `once_seconds` is what runs once a step. `fusion_seconds` is the time of the bytes that fusion could leave out.
    """
    works = [work.balanced(rows) for work in works if work.kind != VIEW]
    parts: dict[str, Counter] = {}
    operators = []
    for work in works:
        if work.repeated:
            runs = work.count / micro_batches
            seconds = work.seconds(rates) * runs
            fused = {"bytes": work.bytes * runs, "fusion_bytes": work.fusion_bytes * runs}
            parts.setdefault(work.part, Counter()).update({work.kind: seconds, "kernels": runs} | fused)
            kept = {k: v for k, v in asdict(work).items() if k not in ("repeated", "rows", "row_bytes")}
            operators.append(kept | fused | {"flops": work.flops * runs, "count": runs, "seconds": seconds})
    whole = sum(parts.values(), Counter())
    seconds_by_kind = {kind: whole[kind] for kind in KINDS}
    return {
        "micro_batch_seconds": sum(seconds_by_kind.values()),
        "seconds_by_kind": seconds_by_kind,
        "memory_bytes": sum(o["bytes"] for o in operators if o["kind"] == MEMORY),
        "fusion_seconds": whole["fusion_bytes"] / (rates.hbm_gb_per_s * 1e9),
        "kernels": whole["kernels"],
        "once_seconds": sum(work.seconds(rates) * work.count for work in works if not work.repeated),
        "parts": sorted(({"part": part, **sums} for part, sums in parts.items()), key=lambda row: -_seconds(row)),
        "operators": sorted(operators, key=lambda row: -row["seconds"])[:KEPT],
    }


def _seconds(row: dict[str, Any]) -> float:
    return sum(row.get(kind, 0) for kind in KINDS)


def roofline_text(record: dict[str, Any]) -> str:
    """A roofline's sums in a sentence."""
    kinds = ", ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in record["seconds_by_kind"].items())
    return (
        f"a micro-batch takes at least {record['micro_batch_seconds'] * 1e3:.1f} ms beside its collectives: {kinds} "
        f"({record['memory_bytes'] / 1e9:.1f} GB); {record['kernels']:,.0f} kernels; fusion could take "
        f"{record['fusion_seconds'] * 1e3:.1f} ms; once a step {record['once_seconds'] * 1e3:.1f} ms"
    )


PART_HEADERS = ["part", *(f"{kind} ms" for kind in KINDS), "GB", "fusion GB", "kernels"]
OPERATOR_HEADERS = ["ms", "GB", "fusion GB", "count", "operator", "part", "types", "shapes"]


def part_rows(record: dict[str, Any]) -> list[list[Any]]:
    """The parts of the model, the longest first."""
    return [
        [row["part"], *(f"{row.get(kind, 0) * 1e3:.2f}" for kind in KINDS)]
        + [f"{row['bytes'] / 1e9:.2f}", f"{row['fusion_bytes'] / 1e9:.2f}", f"{row['kernels']:,.0f}"]
        for row in record["parts"]
    ]


def operator_rows(record: dict[str, Any]) -> list[list[Any]]:
    """The operators, the longest first."""
    return [
        [f"{row['seconds'] * 1e3:.2f}", f"{row['bytes'] / 1e9:.2f}", f"{row['fusion_bytes'] / 1e9:.2f}"]
        + [f"{row['count']:g}", f"{row['operator']} {row['attributes']}".strip(), row["part"]]
        + [row["dtypes"], row["shapes"]]
        for row in record["operators"]
    ]
