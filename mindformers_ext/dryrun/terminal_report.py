"""A dry run's report as text for a terminal: tables, and the sentences that matter first."""

from collections import Counter, defaultdict
from typing import Any

from mindformers_ext.dryrun.report import GIB, summed_collectives
from mindformers_ext.dryrun.rooflines import OPERATOR_HEADERS, PART_HEADERS, operator_rows, part_rows, roofline_text
from mindformers_ext.rank_compiler.operator_rules import DOCUMENTED, DOUBTFUL, VIOLATION
from mindformers_ext.rank_compiler.rank_pool import COMPILED

RANK_HEADERS = ["rank", "stage", "layers", "status", "seconds", "compiler GiB", "weights", "grads", "states"]
RANK_HEADERS += ["planned peak", "unfragmented", "TFLOP", "collectives", "sent in node", "across"]
STAGE_HEADERS = ["stage", "layers", "params 1e9", "weights", "grads", "states", "gathered", "activations", "temporary"]
STAGE_HEADERS += ["GiB a rank", "TFLOP a step", "ms a micro-batch"]
HELD = ("weight", "gradient", "optimizer", "gathered", "activation", "working")


def render(report: dict[str, Any]) -> str:
    """The whole report as text."""
    return f"{render_plan(report)}\n\n{render_ranks(report)}"


def render_plan(report: dict[str, Any]) -> str:
    """What is known before anything is compiled: the rules that are broken, or the estimate."""
    degrees = " ".join(f"{k}={v}" for k, v in report["degrees"].items())
    parts = [f"{report['config']} on {report['device_num']} devices: {degrees}"]
    if report["violations"]:
        parts.append(
            "The strategy is illegal:\n" + "\n".join(f"- {v['key']}: {v['sentence']}" for v in report["violations"])
        )
    if report["estimate"]:
        parts += ["Estimate (bytes in GiB a rank):\n" + stage_table(report), estimate_text(report)]
    return "\n\n".join(parts)


def render_ranks(report: dict[str, Any]) -> str:
    """What compiling has shown, and the verdict."""
    parts = []
    if report["ranks"]:
        parts.append("Compiled ranks (bytes in GiB):\n" + rank_table(report))
        parts += [failure_text(r) for r in report["ranks"] if r["status"] != COMPILED]
        compiled = [r for r in report["ranks"] if r["status"] == COMPILED]
        step = step_text(report)
        parts += [f"Collectives of rank {r['rank']} in {step}:\n" + collective_table(r) for r in compiled[:1]]
        parts += [parameter_text(report["parameter_check"])] if compiled else []
        parts += [longest_roofline(compiled)] if compiled else []
        parts += filter(None, [broken_text(report), doubtful_text(report)])
    parts.append(f"Verdict: {report['verdict']}")
    return "\n\n".join(parts)


def step_text(report: dict[str, Any]) -> str:
    """What was compiled of a step."""
    compiled, micro_batches = report["compiled_micro_batches"], report["degrees"]["micro_batches"]
    return "a step" if compiled == micro_batches else f"{compiled} of a step's {micro_batches} micro-batches"


def table(headers: list[str], rows: list[list[Any]]) -> str:
    """Right-aligned columns of text."""
    cells = [headers] + [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def gib(value: float) -> str:
    """'12.3' for a number of bytes."""
    return f"{value / GIB:.1f}"


def duration(seconds: float) -> str:
    """'7.74 s' or '13.2 ms'."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def stage_table(report: dict[str, Any]) -> str:
    """The estimate, one row a stage."""
    rows = [
        [stage["stage"], stage["layer_names"], f"{stage['parameters'] / 1e9:.2f}"]
        + [gib(stage[f"{k}_bytes"]) for k in HELD]
        + [gib(stage["memory_bytes"]), f"{stage['flops_per_step'] / 1e12:.1f}"]
        + [f"{stage['micro_batch_seconds'] * 1e3:.3g}"]
        for stage in report["estimate"]["stages"]
    ]
    return table(STAGE_HEADERS, rows)


def estimate_text(report: dict[str, Any]) -> str:
    """Time, speed, memory and what bounds them, in a few lines."""
    e = report["estimate"]
    limit = report["memory_limit_bytes"]
    causes = ", ".join(f"{cause} {duration(seconds)}" for cause, seconds in e["seconds_by_cause"].items())
    experts = (
        f"a rank's experts serve 1/{report['degrees']['ep']} of the token choices of its expert-parallel group when "
        f"routing is balanced: {e['tokens_per_expert_rank']:,.0f} a step in each MoE layer"
        if e["tokens_per_expert_rank"]
        else "no experts"
    )
    strongest = ", ".join(f"{words} {change:+.1%}" for words, change in e["sensitivities"][:SHOWN_SENSITIVITIES])
    return "\n".join(
        [
            f"step {duration(e['step_seconds'])}, {e['tokens_per_s']:,.0f} tokens/s, MFU {e['mfu']:.1%} on "
            f"{report['assumptions']['name']}; bound by {e['bound']}",
            f"with the errors on published runs MFU {e['likely_mfu'][0]:.1%} to {e['likely_mfu'][1]:.1%}; 10 % more "
            f"of a number changes the speed by: {strongest}",
            f"slowest stage: {causes}; pipeline ranks wait {e['bubble']:.1%} of the time",
            f"fullest rank {gib(e['memory_bytes'])} GiB of {gib(limit)}; {experts}",
        ]
    )


SHOWN_SENSITIVITIES = 3


def rank_table(report: dict[str, Any]) -> str:
    """The compiled ranks, one row each."""
    rows = []
    for record in report["ranks"]:
        row = [record["rank"], record["stage"], record["layers"], record["status"], f"{record['seconds']:.0f}"]
        if record["status"] == COMPILED:
            row += [gib(record["compiled"]["peak_rss_bytes"])]
            row += [gib(record["bytes"][k]) for k in ("weights", "gradients", "optimizer")]
            row += planned(record) + [tera(record["flops_per_step"])]
            row += [sum(c["count"] for c in record["collectives"]), *map(gib, sent_bytes(record))]
        rows.append(row + ["-"] * (len(RANK_HEADERS) - len(row)))
    return table(RANK_HEADERS, rows)


def planned(record: dict[str, Any]) -> list[str]:
    """MindSpore's planned peak of a rank in GiB, with and without what fragments of its memory pool waste."""
    memory = record["memory"]
    return [gib(memory[k]) if k in memory else "-" for k in ("actual_peak_bytes", "used_peak_bytes")]


def sent_bytes(record: dict[str, Any]) -> tuple[float, float]:
    """Bytes that a compiled rank sends in a step: inside its node, and across nodes."""
    sent: dict[bool, float] = defaultdict(float)
    for collective in record["collectives"]:
        sent[collective["across_nodes"]] += collective["sent_bytes"] or 0
    return sent[False], sent[True]


def tera(flops: float | None) -> str:
    """'526.3' for a number of FLOPs."""
    return f"{flops / 1e12:.1f}" if flops else "-"


def collective_table(record: dict[str, Any]) -> str:
    """A rank's collectives by kind and group size."""
    rows = [
        [r["kind"], r["group_size"], "across nodes" if r["across_nodes"] else "in a node", r["count"]]
        + [f"{r['bytes'] / 1e6:,.1f}", f"{r['sent_bytes'] / 1e6:,.1f}"]
        for r in summed_collectives(record["collectives"])
    ]
    return table(["kind", "group", "where", "count", "tensor MB", "sent MB"], rows)


def longest_roofline(compiled: list[dict[str, Any]]) -> str:
    """The rank whose micro-batch takes longest: its time by part of the model and by operator."""
    record = max(compiled, key=lambda r: r["roofline"]["micro_batch_seconds"])
    roofline = record["roofline"]
    operators = [row[:-2] for row in operator_rows(roofline)[:OPERATORS_SHOWN]]
    parts = [
        f"Operators of rank {record['rank']}: {roofline_text(roofline)}",
        table(PART_HEADERS, part_rows(roofline)),
        table(OPERATOR_HEADERS[:-2], operators),
    ]
    return "\n\n".join(parts)


OPERATORS_SHOWN = 10


def failure_text(record: dict[str, Any]) -> str:
    """Why a rank did not compile: rank, stage, the model's line, the compiler's words, the log."""
    lines = [
        f"rank {record['rank']} (stage {record['stage']}, layers {record['layers']}) {record['status']}: "
        f"{record['message']}"
    ]
    shown = record["source_lines"][:4]  # the operator, and the layers around it
    lines += [f"  {'called at' if i else 'at'} {line}" for i, line in enumerate(shown)]
    lines += [f"  compiler: {text}" for text in record["compiler_errors"][:3]]
    return "\n".join([*lines, f"  log: {record['log']}"])


def broken_text(report: dict[str, Any]) -> str:
    """Operators that break what Ascend documents, with the model's lines; "" when there are none."""
    lines = []
    for f in report["audit"]:
        if f["verdict"] == VIOLATION:
            named = f"{f['operator']} {f['attributes']}".strip()
            lines.append(f"rank {f['ranks'][0]}: {named} of {f['shapes']} breaks a rule: {f['demand']}")
            lines += [f"  {'and' if i else 'at'} {place}" for i, place in enumerate(f["places"][:4])]
            lines.append(f"  {f['document']}")
    return "\n".join(lines)


def doubtful_text(report: dict[str, Any]) -> str:
    """What is doubtful on Ascend, one line for each operator and reason; "" when there is nothing."""
    counts = Counter()
    for f in report["audit"]:
        if f["verdict"] == DOUBTFUL:
            counts[f["operator"], f["demand"], f["remedy"]] += f["count"]
    lines = [f"- {name} ({count} times): {demand}; {remedy}" for (name, demand, remedy), count in counts.items()]
    return "\n".join(["Doubtful on Ascend, in a step of the compiled ranks:", *lines]) if lines else ""


AUDIT_HEADERS = ["verdict", "count", "in MindFormers'", "operator", "attributes", "types"]


def audit_rows(report: dict[str, Any]) -> list[list[Any]]:
    """Every signature of the compiled ranks with its gravest verdict, and how many uses have that."""
    order = [VIOLATION, DOUBTFUL, DOCUMENTED]
    rows: dict[tuple, list[Any]] = {}
    for f in sorted(report["audit"], key=lambda f: order.index(f["verdict"])):
        key = (f["operator"], f["attributes"], f["dtypes"])
        rows.setdefault(key, [f["verdict"], f["count"], "yes" if f["in_mindformers"] else "no", *key])
    return list(rows.values())


def audit_table(report: dict[str, Any]) -> str:
    """The signatures with their verdicts, one a line."""
    rows = [AUDIT_HEADERS, *audit_rows(report)]
    return "\n".join(f"{row[0]:<10}  {row[1]:>6}  {row[2]:<15}  {'  '.join(filter(None, row[3:]))}" for row in rows)


def parameter_text(check: dict[str, Any]) -> str:
    """Whether the compiled weights, counted once, are the model's."""
    if check["differences"]:
        shown = "\n".join(f"- {d}" for d in check["differences"][:10])
        return f"Weights differ from the plan in {len(check['differences'])} places:\n{shown}"
    return f"Weights of the compiled stages, counted once: {check['values']:,} values, as the model has there"
