"""A dry run's report as one self-contained HTML file: tables, and plots inlined as SVG."""

import html
import io
from pathlib import Path
from typing import Any

from mindformers_ext.dryrun.report import GIB, summed_collectives
from mindformers_ext.dryrun.rooflines import OPERATOR_HEADERS, PART_HEADERS, operator_rows, part_rows, roofline_text
from mindformers_ext.dryrun.terminal_report import (
    AUDIT_HEADERS,
    HELD,
    audit_rows,
    broken_text,
    doubtful_text,
    estimate_text,
    failure_text,
    parameter_text,
    planned,
    sent_bytes,
    tera,
)
from mindformers_ext.rank_compiler.rank_pool import COMPILED

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 82em; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; } pre { white-space: pre-wrap; }
th, td { border: 1px solid #ddd; padding: .25em .5em; text-align: right; } th { background: #f2f4f7; }
td { white-space: nowrap; }
.bad { color: #a00; } .good { color: #070; } details { margin: .5em 0; } summary { cursor: pointer; }
.plots { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; } svg { width: 100%; height: auto; }
.notes td:last-child { text-align: left; }
"""


def render_html(report: dict[str, Any]) -> str:
    """The report as an HTML document that needs no other file."""
    good = report["exit_code"] == 0
    degrees = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in report["degrees"].items())
    body = [
        f"<h1>Dry run of {html.escape(Path(report['config']).name)} on {report['device_num']} devices</h1>",
        f"<p>{degrees}. <b class='{'good' if good else 'bad'}'>Verdict: {html.escape(report['verdict'])}.</b></p>",
    ]
    if report["violations"]:
        items = "".join(f"<li><code>{v['key']}</code>: {html.escape(v['sentence'])}</li>" for v in report["violations"])
        body.append(f"<h2>Rules that the strategy breaks</h2><ul class='bad'>{items}</ul>")
    if report["estimate"]:
        body += _estimate_section(report)
    if report["ranks"]:
        body += _ranks_section(report)
    body.append("<h2>Assumptions</h2>" + _assumptions(report))
    title = f"<title>Dry run, {report['device_num']} devices</title>"
    return f"<!doctype html><meta charset='utf-8'>{title}<style>{STYLE}</style>{''.join(body)}\n"


def _estimate_section(report: dict[str, Any]) -> list[str]:
    rows = [
        [s["stage"], s["layer_names"], f"{s['parameters']:,}"]
        + [f"{s[f'{k}_bytes'] / GIB:.2f}" for k in HELD]
        + [f"{s['memory_bytes'] / GIB:.1f}", tera(s["flops_per_step"]), f"{s['micro_batch_seconds'] * 1e3:.3g}"]
        for s in report["estimate"]["stages"]
    ]
    headers = [
        "stage",
        "layers",
        "parameters",
        *(f"{k} GiB" for k in HELD),
        "sum GiB",
        "TFLOP a step",
        "ms a micro-batch",
    ]
    plots = [_memory_bars, _time_bars, _stage_times, _stage_traffic]
    return [
        f"<h2>Estimate</h2><pre>{html.escape(estimate_text(report))}</pre>",
        f"<div class='plots'>{''.join(_plot(draw, report) for draw in plots)}</div>",
        "<p>Bytes and TFLOP are of one rank, parameters of the whole stage.</p>",
        _table(headers, rows),
    ]


def _ranks_section(report: dict[str, Any]) -> list[str]:
    compiled = [r for r in report["ranks"] if r["status"] == COMPILED]
    failed = [r for r in report["ranks"] if r["status"] != COMPILED]
    body = ["<h2>Compiled ranks</h2>"]
    body += [f"<pre class='bad'>{html.escape(failure_text(r))}</pre>" for r in failed]
    if not compiled:
        return body
    rows = [
        [r["rank"], r["stage"], r["layers"], f"{r['seconds']:.0f}", f"{r['compiled']['peak_rss_bytes'] / GIB:.1f}"]
        + [f"{r['parameters']:,}"]
        + [f"{r['bytes'][k] / GIB:.2f}" for k in ("weights", "gradients", "optimizer", "other")]
        + planned(r)
        + [tera(r["flops_per_step"]), sum(c["count"] for c in r["collectives"])]
        + [f"{sent / 1e9:.1f}" for sent in sent_bytes(r)]
        for r in compiled
    ]
    headers = ["rank", "stage", "layers", "seconds", "compiler GiB", "values held", "weights GiB", "gradients GiB"]
    headers += [
        "optimizer GiB",
        "other GiB",
        "planned peak GiB",
        "without fragments GiB",
        "TFLOP a step",
        "collectives a step",
    ]
    body.append(_table([*headers, "GB sent in node", "GB sent across"], rows))
    body.append(f"<p>{html.escape(PLAN_NOTE if compiled[0]['memory'] else '')}</p>")
    body.append(f"<p>{html.escape(parameter_text(report['parameter_check']))}</p>")
    body.append(f"<h2>Operators on Ascend</h2><pre class='bad'>{html.escape(broken_text(report))}</pre>")
    body.append(f"<pre>{html.escape(doubtful_text(report))}</pre>")
    signatures = audit_rows(report)
    body.append(_details(f"all {len(signatures)} signatures", _table(AUDIT_HEADERS, signatures)))
    body.append("<h2>Time of operators in a micro-batch</h2>")
    for record in compiled:
        roofline = record["roofline"]
        body.append(f"<p>rank {record['rank']}: {html.escape(roofline_text(roofline))}</p>")
        body.append(_table(PART_HEADERS, part_rows(roofline)))
        rows = operator_rows(roofline)
        body.append(_details(f"rank {record['rank']}: the {len(rows)} longest", _table(OPERATOR_HEADERS, rows)))
    body.append(f"<h2>Collectives in a step</h2><div class='plots'>{_plot(_collective_bars, compiled)}</div>")
    for record in compiled:
        body.append(_details(f"rank {record['rank']}: collectives", _collectives(record)))
        layouts = [list(row.values()) for row in record["layouts"]]
        headers = ["weight", "whole shape", "device matrix", "tensor map", "stored shape"]
        body.append(_details(f"rank {record['rank']}: layout of {len(layouts)} weights", _table(headers, layouts)))
    body.append(
        "<p>Tensor map: for each dimension the device axis that splits it, counted from the last; -1 for none.</p>"
    )
    return body


PLAN_NOTE = (
    "The planned peak is what MindSpore's memory pool takes, fragments included; a card whose driver maps virtual "
    "memory (24.0 or newer) has fewer of them."
)


UNSHOWN = ("notes", "operators")


def _assumptions(report: dict[str, Any]) -> str:
    notes = report["assumptions"]["notes"]
    rows = [(key, value, notes.get(key, "")) for key, value in report["assumptions"].items() if key not in UNSHOWN]
    return f"<div class='notes'>{_table(['name', 'value', 'where from'], rows)}</div>"


def _collectives(record: dict[str, Any]) -> str:
    rows = [
        [r["kind"], r["group_size"], "across nodes" if r["across_nodes"] else "inside a node", r["count"]]
        + [f"{r['bytes'] / 1e6:,.1f}", f"{r['sent_bytes'] / 1e6:,.1f}"]
        for r in summed_collectives(record["collectives"])
    ]
    return _table(["kind", "group size", "place", "count", "tensors MB", "sent MB"], rows)


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>{content}</details>"


def _table(headers: list[str], rows) -> str:
    head = "".join(f"<th>{html.escape(str(h))}</th>" for h in headers)
    lines = ("".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _plot(draw, data) -> str:
    """An SVG element of what `draw(axes, data)` draws."""
    from matplotlib.figure import Figure  # takes seconds to import: an illegal plan has nothing to plot

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    draw(figure.subplots(), data)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _stacked(axes, x: list, parts: dict[str, list[float]]) -> None:
    """Bars of several parts each, with a legend beside them."""
    bottom = [0.0] * len(x)
    for label, heights in parts.items():
        axes.bar(x, heights, bottom=bottom, label=label)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]


def _legend(axes) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _stages(axes, report: dict[str, Any], title: str, unit: str) -> list[int]:
    """Numbers of the stages, after naming the axes of a plot over them."""
    numbers = [s["stage"] for s in report["estimate"]["stages"]]
    axes.set(title=title, xlabel="stage", ylabel=unit, xticks=numbers[:: -(-len(numbers) // 16)])
    return numbers


def _memory_bars(axes, report: dict[str, Any]) -> None:
    stages = report["estimate"]["stages"]
    x = _stages(axes, report, "Memory of a rank, estimated", "GiB")
    _stacked(axes, x, {kind: [s[f"{kind}_bytes"] / GIB for s in stages] for kind in HELD})
    peaks = [(r["stage"], r["memory"]["actual_peak_bytes"] / GIB) for r in report["ranks"] if r.get("memory")]
    if peaks:
        axes.plot(*zip(*peaks, strict=True), "k_", markersize=12, label="MindSpore's plan")
    axes.axhline(report["memory_limit_bytes"] / GIB, color="red", linestyle="--", label="limit")
    _legend(axes)


def _time_bars(axes, report: dict[str, Any]) -> None:
    causes = report["estimate"]["seconds_by_cause"]
    unit, scale = ("seconds", 1) if max(causes.values()) >= 1 else ("ms", 1e3)
    bars = axes.barh(list(causes), [seconds * scale for seconds in causes.values()])
    axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(title="One step on the slowest stage, by cause", xlabel=unit)


def _stage_times(axes, report: dict[str, Any]) -> None:
    stages = report["estimate"]["stages"]
    title = f"One micro-batch, forward and backward (pipeline idle {report['estimate']['bubble']:.1%})"
    x = _stages(axes, report, title, "ms")
    causes = dict.fromkeys(cause for s in stages for cause in s["seconds"])
    parts = {cause: [s["seconds"].get(cause, 0) * 1e3 for s in stages] for cause in causes}
    _stacked(axes, x, parts)
    _legend(axes)


def _stage_traffic(axes, report: dict[str, Any]) -> None:
    stages = report["estimate"]["stages"]
    x = _stages(axes, report, "Bytes a rank sends in a step, estimated", "GB")
    _stacked(axes, x, _gigabytes("purpose", [s["transfers"] for s in stages]))
    _legend(axes)


def _gigabytes(key: str, bars: list[list[dict[str, Any]]]) -> dict[str, list[float]]:
    """What is sent for each value of `key`, for each bar."""
    sums = {value: [0.0] * len(bars) for value in sorted({t[key] for transfers in bars for t in transfers})}
    for i, transfers in enumerate(bars):
        for transfer in transfers:
            sums[transfer[key]][i] += (transfer["sent_bytes"] or 0) / 1e9
    return sums


def _collective_bars(axes, ranks: list[dict[str, Any]]) -> None:
    names = [f"rank {r['rank']}" for r in ranks]
    _stacked(axes, names, _gigabytes("kind", [r["collectives"] for r in ranks]))
    axes.set(title="Bytes a rank sends in a step, as compiled", ylabel="GB")
    axes.tick_params(axis="x", rotation=60, labelsize=7)
    _legend(axes)
