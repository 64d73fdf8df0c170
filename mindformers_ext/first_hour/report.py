"""What the first hour found: a verdict, tables for a terminal, and one HTML file."""

import html
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from mindformers_ext.dryrun.device_profile import DEFAULT_PROFILE, load_profile
from mindformers_ext.dryrun.html_report import STYLE, _details, _table
from mindformers_ext.dryrun.report import GIB
from mindformers_ext.dryrun.terminal_report import table
from mindformers_ext.rank_compiler.roofline import Work

FAILED = "failed"


def operator_verdict(record: dict[str, Any]) -> str:
    """ "agrees", "differs" or "failed"."""
    return FAILED if FAILED in record else "agrees" if record["agrees"] else "differs"


def estimated_seconds(record: dict[str, Any], profile) -> float:
    """The least time of an operator on the profile's device."""
    numbers = {"repeated": True, "fusion_bytes": 0.0, "rows": 0, "row_bytes": 0.0}
    names = ("operator", "attributes", "dtypes", "shapes", "part", "kind", "flops", "bytes")
    return Work(**numbers, **{name: record[name] for name in names}).seconds(profile)


def estimated_beside_measured(done: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows {what, estimated, measured, unit}: operators by kind, the step, each rank's memory."""
    on_cpu = not done["training"].get("memory")
    path = done["profile"].get("path") if on_cpu else DEFAULT_PROFILE  # of a CPU nothing was assumed before
    rows = []
    ran = [record for record in done["operators"].get("records", []) if record.get("seconds")]
    if ran and path and Path(path).exists():
        profile = load_profile(path)
        for kind in dict.fromkeys(record["kind"] for record in ran):
            mine = [record for record in ran if record["kind"] == kind]
            estimated = sum(estimated_seconds(record, profile) for record in mine)
            measured = sum(record["seconds"] for record in mine)
            rows.append(_row(f"{kind} operators, each once", estimated * 1e3, measured * 1e3, "ms"))
    steps = done["training"].get("device", [])[1:]
    estimate = done["compilation"].get("estimate")
    if steps and estimate and not on_cpu:
        speed = statistics.median(step["tokens_per_s"] for step in steps)
        rows.append(_row("tokens a second", estimate["tokens_per_s"], speed, "tokens/s"))
    for rank, peak in done["training"].get("memory", {}).items():
        planned = done["compilation"].get("planned", {}).get(rank)
        if planned:
            rows.append(_row(f"peak memory of rank {rank}", planned / GIB, peak / GIB, "GiB"))
    return rows


def _row(what: str, estimated: float, measured: float, unit: str) -> dict[str, Any]:
    missed = measured / estimated - 1 if estimated else None
    return {"what": what, "estimated": estimated, "measured": measured, "unit": unit, "missed": missed}


def loss_differences(training: dict[str, Any]) -> list[dict[str, Any]]:
    """Each step's loss on the devices and on CPU, and the difference over the latter."""
    pairs = zip(training.get("device", []), training.get("cpu", []), strict=False)
    return [
        {"step": a["step"], "device": a["loss"], "cpu": b["loss"], "difference": abs(a["loss"] - b["loss"]) / b["loss"]}
        for a, b in pairs
        if a["loss"] is not None and b["loss"] is not None
    ]


def verdict_of(done: dict[str, Any], loss_tolerance: float) -> tuple[str, int]:
    """One sentence, and the exit code: 0 when everything was done and agrees."""
    wrong = [f"{name} was not done ({record[FAILED]})" for name, record in done.items() if FAILED in record]
    wrong += [
        f"{row['name']} is {row['found']}, wanted {row['wanted']}"
        for row in done["environment"].get("rows", [])
        if row["right"] is False
    ]
    verdicts = Counter(operator_verdict(record) for record in done["operators"].get("records", []))
    wrong += [
        f"{verdicts[kind]} operators {word}"
        for kind, word in (("differs", "differ"), (FAILED, "failed"))
        if verdicts[kind]
    ]
    lost = sum(not record["right"] for record in done["collectives"].get("records", []))
    wrong += [f"{lost} collectives gave wrong numbers"] if lost else []
    losses = loss_differences(done["training"])
    worst = max((row["difference"] for row in losses), default=None)
    if FAILED not in done["training"] and (worst is None or worst > loss_tolerance):
        wrong.append(f"losses differ by up to {worst:.2%}" if losses else "no losses were compared")
    if wrong:
        return f"{len(wrong)} things need a look: {'; '.join(wrong)}", 1
    agreed = f"all agrees: {verdicts['agrees']} operators, {len(done['collectives'].get('records', []))} collectives, "
    return agreed + f"losses of {len(losses)} steps within {worst:.2%}", 0


def environment_rows(done: dict[str, Any]) -> list[list[Any]]:
    """Name, found, wanted, verdict, what to do."""
    words = {True: "right", False: "WRONG", None: "-"}
    return [
        [r["name"], r["found"], r["wanted"], words[r["right"]], "" if r["right"] else r["to_do"]]
        for r in done["environment"].get("rows", [])
    ]


ENVIRONMENT_HEADERS = ["", "found", "wanted", "", "to do"]
ESTIMATE_HEADERS = ["", "estimated", "measured", "unit", "missed by"]
OPERATOR_HEADERS = ["", "error", "allowed", "ms", "operator", "part", "types", "shapes"]
COLLECTIVE_HEADERS = ["operation", "group", "bytes", "ms", "right"]
LOSS_HEADERS = ["step", "device", "CPU", "difference"]


def estimate_rows(report: dict[str, Any]) -> list[list[Any]]:
    return [
        [r["what"], f"{r['estimated']:,.4g}", f"{r['measured']:,.4g}", r["unit"]]
        + ["-" if r["missed"] is None else f"{r['missed']:+.1%}"]
        for r in report["estimates"]
    ]


def operator_rows(records: list[dict[str, Any]]) -> list[list[Any]]:
    """Those that failed first, then those that differ, then the longest."""
    order = (FAILED, "differs", "agrees")
    ranked = sorted(records, key=lambda r: (order.index(operator_verdict(r)), -r.get("seconds", 0)))
    return [
        [operator_verdict(r), r.get(FAILED) or f"{r['error']:.2g}", f"{r.get('tolerance', 0):.2g}"]
        + [f"{r.get('seconds', 0) * 1e3:.3f}", f"{r['operator']} {r['attributes']}".strip(), r["part"]]
        + [r["dtypes"], r["shapes"]]
        for r in ranked
    ]


def collective_rows(done: dict[str, Any]) -> list[list[Any]]:
    return [
        [r["operation"], r["group"], f"{r['bytes']:,}", f"{r['seconds'] * 1e3:.3f}", "yes" if r["right"] else "NO"]
        for r in done["collectives"].get("records", [])
    ]


def loss_rows(done: dict[str, Any]) -> list[list[Any]]:
    rows = loss_differences(done["training"])
    return [[r["step"], f"{r['device']:.5f}", f"{r['cpu']:.5f}", f"{r['difference']:.2e}"] for r in rows]


def summary(report: dict[str, Any]) -> str:
    """The tables that fit a terminal."""
    records = report["operators"].get("records", [])
    bad = [row[:5] for row in operator_rows(records) if row[0] != "agrees"]
    parts = [table(ENVIRONMENT_HEADERS, environment_rows(report))]
    parts += [f"Operators that failed or differ:\n{table(OPERATOR_HEADERS[:5], bad)}"] if bad else []
    parts += [f"Losses:\n{table(LOSS_HEADERS, loss_rows(report))}"] if loss_rows(report) else []
    parts += [f"Estimates:\n{table(ESTIMATE_HEADERS, estimate_rows(report))}"] if report["estimates"] else []
    return "\n\n".join(parts)


def render_html(report: dict[str, Any]) -> str:
    """The report as one file that needs no other."""
    good = report["verdict"].startswith("all agrees")
    records = report["operators"].get("records", [])
    steps = [[name, step[FAILED]] for name, step in report.items() if isinstance(step, dict) and FAILED in step]
    body = [
        f"<h1>The first hour: {html.escape(report['config'])} on {report['ranks']} × {report['device']}</h1>",
        f"<p class='{'good' if good else 'bad'}'>{html.escape(report['verdict'])}</p>",
        _table(["not done", "why"], steps) if steps else "",
        f"<h2>Environment</h2>{_table(ENVIRONMENT_HEADERS, environment_rows(report))}",
        f"<h2>Estimate and measurement</h2>{_table(ESTIMATE_HEADERS, estimate_rows(report))}",
        f"<h2>Losses</h2>{_table(LOSS_HEADERS, loss_rows(report))}",
        f"<h2>Operators</h2>{_details(f'{len(records)} operators', _table(OPERATOR_HEADERS, operator_rows(records)))}",
        f"<h2>Collectives</h2>{_table(COLLECTIVE_HEADERS, collective_rows(report))}",
    ]
    head = f"<!doctype html><html><head><meta charset='utf-8'><title>First hour</title><style>{STYLE}</style></head>"
    return f"{head}<body>{''.join(body)}</body></html>"
