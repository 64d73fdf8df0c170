"""A dry run's report as one self-contained HTML file: tables, and plots inlined as SVG."""

import html
import io
from typing import Any

from mindformers_ext.dryrun.rank_pool import COMPILED
from mindformers_ext.dryrun.report import GIB, summed_collectives
from mindformers_ext.dryrun.terminal_report import HELD, VERDICT, estimate_text, failure_text, parameter_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
h1 { font-size: 1.4em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; } pre { white-space: pre-wrap; }
th, td { border: 1px solid #ddd; padding: .25em .6em; text-align: right; } th { background: #f2f4f7; }
.bad { color: #a00; } .good { color: #070; } details { margin: .5em 0; } svg { max-width: 100%; height: auto; }
"""


def render_html(report: dict[str, Any]) -> str:
    """The report as an HTML document that needs no other file."""
    good = report["exit_code"] == 0
    verdict = VERDICT.get(report["exit_code"], "the tool failed")
    degrees = ", ".join(f"{k} {v}" for k, v in report["degrees"].items())
    body = [
        f"<h1>Dry run of {html.escape(report['config'])} on {report['device_num']} devices</h1>",
        f"<p>{degrees}. <b class='{'good' if good else 'bad'}'>Verdict: {verdict}.</b></p>",
    ]
    if report["violations"]:
        items = "".join(f"<li><code>{v['key']}</code>: {html.escape(v['sentence'])}</li>" for v in report["violations"])
        body.append(f"<h2>Rules that the strategy breaks</h2><ul class='bad'>{items}</ul>")
    if report["estimate"]:
        body += _estimate_section(report)
    if report["ranks"]:
        body += _ranks_section(report)
    body.append("<h2>Assumptions</h2>" + _table(["assumption", "value"], report["assumptions"].items()))
    title = f"<title>Dry run, {report['device_num']} devices</title>"
    return f"<!doctype html><meta charset='utf-8'>{title}<style>{STYLE}</style>{''.join(body)}\n"


def _estimate_section(report: dict[str, Any]) -> list[str]:
    estimate = report["estimate"]
    rows = [
        [s["stage"], s["layer_names"], f"{s['parameters']:,}"]
        + [f"{s[f'{k}_bytes'] / GIB:.2f}" for k in HELD]
        + [
            f"{s['memory_bytes'] / GIB:.1f}",
            f"{s['flops_per_step'] / 1e12:.1f}",
            f"{s['micro_batch_seconds'] * 1e3:.0f}",
        ]
        for s in estimate["stages"]
    ]
    headers = ["stage", "layers", "parameters", *(f"{k} GiB" for k in HELD), "sum GiB", "TFLOP/step", "ms/micro-batch"]
    return [
        f"<h2>Estimate</h2><pre>{html.escape(estimate_text(report))}</pre>",
        _plot(_memory_bars, report) + _plot(_time_bars, report) + _plot(_stage_times, report),
        _table(headers, rows),
    ]


def _ranks_section(report: dict[str, Any]) -> list[str]:
    compiled = [r for r in report["ranks"] if r["status"] == COMPILED]
    failed = [r for r in report["ranks"] if r["status"] != COMPILED]
    body = ["<h2>Compiled ranks</h2>"]
    rows = [
        [r["rank"], r["stage"], r["layers"], f"{r['seconds']:.0f}", f"{r['compiled']['peak_rss_bytes'] / GIB:.1f}"]
        + [f"{r['bytes'][k] / GIB:.2f}" for k in ("weights", "gradients", "optimizer", "other")]
        + [f"{r['memory']['actual_peak_bytes'] / GIB:.1f}" if r["memory"] else "-", f"{r['flops_per_step'] / 1e12:.1f}"]
        for r in compiled
    ]
    headers = ["rank", "stage", "layers", "seconds", "compiler GiB", "weights GiB", "gradients GiB", "optimizer GiB"]
    body.append(_table([*headers, "other GiB", "planned peak GiB", "TFLOP/step"], rows))
    body += [f"<pre class='bad'>{html.escape(failure_text(r))}</pre>" for r in failed]
    body.append(f"<p>{html.escape(parameter_text(report['parameter_check']))}</p>")
    if compiled:
        body.append("<h2>Collectives in a step</h2>" + _plot(_collective_bars, compiled))
    for record in compiled:
        body.append(_details(f"rank {record['rank']}: collectives", _collectives(record)))
        layouts = [list(row.values()) for row in record["layouts"]]
        headers = ["weight", "whole shape", "device matrix", "tensor map", "stored shape"]
        body.append(_details(f"rank {record['rank']}: layout of {len(layouts)} weights", _table(headers, layouts)))
    return body


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

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    draw(figure.subplots(), data)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _memory_bars(axes, report: dict[str, Any]) -> None:
    stages = report["estimate"]["stages"]
    bottom = [0.0] * len(stages)
    for kind in HELD:
        heights = [s[f"{kind}_bytes"] / GIB for s in stages]
        axes.bar(range(len(stages)), heights, bottom=bottom, label=kind)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    planned = {r["stage"]: r["memory"]["actual_peak_bytes"] / GIB for r in report["ranks"] if r.get("memory")}
    if planned:
        axes.plot(list(planned), list(planned.values()), "k_", markersize=18, label="planned by the compiler")
    axes.axhline(report["memory_limit_bytes"] / GIB, color="red", linestyle="--", label="limit")
    axes.set(title="Memory of a rank", xlabel="stage", ylabel="GiB")
    axes.legend(fontsize=7, ncols=3)


def _time_bars(axes, report: dict[str, Any]) -> None:
    causes = report["estimate"]["seconds_by_cause"]
    axes.barh(list(causes), list(causes.values()))
    axes.invert_yaxis()
    axes.set(title="One step on the slowest stage, by cause", xlabel="seconds")


def _stage_times(axes, report: dict[str, Any]) -> None:
    stages = report["estimate"]["stages"]
    axes.bar([s["stage"] for s in stages], [s["micro_batch_seconds"] * 1e3 for s in stages])
    bubble = report["estimate"]["bubble"]
    axes.set(title=f"One micro-batch, forward and backward (pipeline idle {bubble:.1%})", xlabel="stage", ylabel="ms")


def _collective_bars(axes, ranks: list[dict[str, Any]]) -> None:
    names = [f"rank {r['rank']}" for r in ranks]
    bottom = [0.0] * len(ranks)
    for kind in sorted({c["kind"] for r in ranks for c in r["collectives"]}):
        sums = [sum(c["sent_bytes"] or 0 for c in r["collectives"] if c["kind"] == kind) / 1e9 for r in ranks]
        axes.bar(names, sums, bottom=bottom, label=kind)
        bottom = [b + s for b, s in zip(bottom, sums, strict=True)]
    axes.set(title="Bytes a rank sends", ylabel="GB")
    axes.tick_params(axis="x", rotation=60)
    axes.legend(fontsize=7)
