"""Check, compile, cost and explain any rank of a cluster's YAML on a machine without an Ascend card.

    python scripts/dryrun.py --config research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml --device_num 1024

Exit code: 0 the run fits, 1 it is illegal or does not fit, 2 the tool itself failed.
"""

import argparse
import json
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mindformers_ext.config.command_line import parse_overrides  # noqa: E402
from mindformers_ext.config.run import Run, read_run  # noqa: E402
from mindformers_ext.config.strategy_rules import check_plan  # noqa: E402
from mindformers_ext.dryrun.cost_model import estimate  # noqa: E402 (after the project is on the path)
from mindformers_ext.dryrun.device_profile import DEFAULT_PROFILE, DeviceProfile, load_profile  # noqa: E402
from mindformers_ext.dryrun.html_report import render_html  # noqa: E402
from mindformers_ext.dryrun.report import TOOL_FAILURE, compiled_micro_batches, make_report, memory_limit  # noqa: E402
from mindformers_ext.dryrun.sweep import Candidate, parse_axes, sweep  # noqa: E402
from mindformers_ext.dryrun.terminal_report import GIB, audit_table, render_plan, render_ranks, table  # noqa: E402
from mindformers_ext.errors import ConfigError, exit_code_of, of_files  # noqa: E402
from mindformers_ext.files.atomic import write_json, write_text  # noqa: E402
from mindformers_ext.files.json_files import short  # noqa: E402
from mindformers_ext.rank_compiler.stand_in_cann import COMPILE, MEMORY, StandInError  # noqa: E402

LEVELS = {"compile": COMPILE, "memory": MEMORY}
COMPARED = {
    "step seconds": lambda c: f"{c.step_seconds:.2f}",
    "tokens/s": lambda c: f"{c.tokens_per_s:,.0f}",
    "MFU": lambda c: f"{c.mfu:.1%}",
    "bound by": lambda c: c.bound,
    "pipeline idle": lambda c: f"{c.bubble:.1%}",
    "fullest rank GiB": lambda c: f"{c.memory_bytes / GIB:.1f}",
    "parameters": lambda c: f"{c.parameters:,}",
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; everything else is --section.key value, as for run_mindformer.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML of the run")
    parser.add_argument(
        "--device_num", type=positive, help="devices of the cluster (default: the product of the degrees)"
    )
    parser.add_argument(
        "--ranks", default="per-stage", help="per-stage, all-stages-first-last, all, none, or a list as 0,64,128"
    )
    parser.add_argument("--level", choices=LEVELS, default="compile", help="memory also plans the device memory")
    parser.add_argument("--audit", action="store_true", help="list every operator that the ranks run, with its verdict")
    parser.add_argument("--jobs", type=positive, default=1, help="ranks compiled at a time")
    parser.add_argument("--out", type=Path, help="folder for report.json, report.html and the ranks' logs")
    parser.add_argument(
        "--device", default=DEFAULT_PROFILE, help="device profile: a YAML file, or a name as a2, a3, h100"
    )
    parser.add_argument("--register_path", default="research/deepseek3", help="folder of the model's Python files")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a rank may take")
    parser.add_argument("--compare", help="another YAML, estimated beside --config with its overrides")
    parser.add_argument("--sweep", nargs="+", metavar="KEY=V1,V2", help="try all combinations of these keys")
    parser.add_argument("--verify", type=int, default=0, metavar="K", help="compile the best K of the sweep")
    return parser


def positive(text: str) -> int:
    """A whole number of at least 1 from the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def chosen_ranks(text: str, plan: Run) -> list[int]:
    """Ranks that --ranks asks for."""
    stage = plan.devices_per_stage
    named = {
        "none": [],
        "all": list(range(plan.device_num)),
        "per-stage": [i * stage for i in range(plan.pp)],
        "all-stages-first-last": sorted({r for i in range(plan.pp) for r in (i * stage, (i + 1) * stage - 1)}),
    }
    if text in named:
        return named[text]
    ranks = [int(part) if part.isdigit() else -1 for part in text.split(",")]
    for rank in ranks:
        if not 0 <= rank < plan.device_num:
            raise ConfigError(
                f"--ranks {text}: give {', '.join(named)}, or numbers from 0 to {plan.device_num - 1} as 0,64,128"
            )
    return list(dict.fromkeys(ranks))


def dry_run(options, plan: Run, overrides: list[tuple[str, Any]], profile: DeviceProfile, out: Path) -> int:
    """Check, estimate and compile one plan; print and write its report; return the exit code.

    The estimate is printed before anything is compiled: often it is the answer.
    """
    violations = check_plan(plan)
    cost = None if violations else estimate(plan, profile)
    ranks = [] if violations else chosen_ranks(options.ranks, plan)
    out.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    print(render_plan(make_report(plan, profile, violations, cost, [])), end="\n\n", flush=True)
    results = compile_plan(options, plan, overrides, ranks, out) if ranks else []
    report = make_report(plan, profile, violations, cost, results)
    write_json(out / "report.json", report)
    write_text(out / "report.html", render_html(report))
    if options.audit:
        print(f"Operators in a step of the compiled ranks:\n{audit_table(report)}\n")
    print(render_ranks(report))
    print(f"\nreport: {out / 'report.html'} and {out / 'report.json'}")
    return report["exit_code"]


def compile_plan(options, plan: Run, overrides: list[tuple[str, Any]], ranks: list[int], out: Path) -> list:
    """Compile `ranks` through run_mindformer.py's path, of a long step only as many micro-batches as tell all."""
    from mindformers_ext.config.command_line import find
    from mindformers_ext.rank_compiler.rank_pool import RankJobs, compile_ranks

    micro_batches = compiled_micro_batches(plan)
    if micro_batches < plan.micro_batches:
        overrides = [*overrides, ("parallel_config.micro_batch_num", micro_batches)]
    samples = plan.global_batch // plan.micro_batches * micro_batches
    arguments = ["--samples", str(samples), "--config", str(Path(options.config).resolve())]
    arguments += ["--register_path", str(find(options.register_path).resolve())]
    arguments += [text for key, value in overrides for text in (f"--{key}", json.dumps(value))]
    jobs = RankJobs(
        module="mindformers_ext.rank_compiler.compile_run",
        arguments=lambda folder: ["--out", str(folder), *arguments],
        world_size=plan.device_num,
        devices_per_stage=plan.devices_per_stage,
        out=out,
        level=LEVELS[options.level],
        timeout_seconds=options.timeout,
        python_path=(str(ROOT),),
    )
    return compile_ranks(jobs, ranks, options.jobs)


def compare(options, plan: Run, profile: DeviceProfile) -> int:
    """Print the estimates of two YAMLs side by side; 0 when both are legal and fit."""
    plans = [plan, read_run(options.compare)]  # each on its own number of devices
    bad = False
    for other in plans:
        for violation in check_plan(other):
            bad = True
            print(f"{other.path}: {violation.key}: {violation.sentence}")
    if bad:
        return 1
    costs = [estimate(p, profile) for p in plans]
    degrees = [f"dp{p.dp} cp{p.cp} mp{p.mp} pp{p.pp} ep{p.ep} m{p.micro_batches}" for p in plans]
    rows = [["devices", *(p.device_num for p in plans)], ["layout", *degrees]] + [
        [name, *map(show, costs)] for name, show in COMPARED.items()
    ]
    names = [Path(p.path).name for p in plans]
    if names[0] == names[1]:
        names[0] += " + overrides"
    print(table(["", *names], rows))
    return int(any(c.memory_bytes > memory_limit(p, profile) for p, c in zip(plans, costs, strict=True)))


def run_sweep(options, plan: Run, overrides: list[tuple[str, Any]], profile: DeviceProfile, out: Path) -> int:
    """Print the legal combinations, the best first, and compile the best --verify of them."""
    axes = parse_axes(options.sweep, plan)
    legal, illegal = sweep(options.config, plan.device_num, overrides, axes, profile)
    print(
        f"{len(legal) + len(illegal)} combinations, {len(legal)} legal, {sum(c.fits for c in legal)} within memory; "
        "those first, and the fastest first"
    )
    if legal:
        hidden = [key for key in axes if key not in SHOWN_KEYS]
        rows = [sweep_row(i, c) + [short(c.plan.value(key)) for key in hidden] for i, c in enumerate(legal, 1)]
        print(table(SWEEP_HEADERS + [key.rpartition(".")[2] for key in hidden], rows))
    for sentence in illegal[:ILLEGAL_SHOWN]:
        print(f"illegal: {sentence}")
    if len(illegal) > ILLEGAL_SHOWN:
        print(f"and {len(illegal) - ILLEGAL_SHOWN} more are illegal")
    write_json(out / "sweep.json", [{"overrides": c.overrides, **c.cost.to_json()} for c in legal])
    codes = [0 if any(c.fits for c in legal) else 1]
    for index, candidate in enumerate(legal[: options.verify], 1):
        print(f"\n=== compiling candidate {index} ===")
        chosen = overrides + candidate.overrides
        codes.append(dry_run(options, candidate.plan, chosen, profile, out / f"candidate_{index}"))
    return max(codes)


ILLEGAL_SHOWN = 5
# Keys that have a column of their own in every table.
SHOWN_KEYS = {
    f"parallel_config.{key}"
    for key in ("data_parallel", "context_parallel", "model_parallel", "pipeline_stage", "expert_parallel")
} | {"parallel_config.micro_batch_num", "runner_config.gradient_accumulation_steps"}
SWEEP_HEADERS = [
    "",
    "dp",
    "cp",
    "mp",
    "pp",
    "ep",
    "micro",
    "batch",
    "step s",
    "tokens/s",
    "MFU",
    "GiB",
    "fits",
    "bound by",
]


def sweep_row(index: int, candidate: Candidate) -> list[Any]:
    """One line of the sweep's table."""
    p, c = candidate.plan, candidate.cost
    return [index, p.dp, p.cp, p.mp, p.pp, p.ep, p.micro_batches, p.global_batch, f"{c.step_seconds:.2f}"] + [
        f"{c.tokens_per_s:,.0f}",
        f"{c.mfu:.1%}",
        f"{c.memory_bytes / GIB:.1f}",
        "yes" if candidate.fits else "no",
        c.bound,
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the asked check; see the head of this file for the exit code."""
    options, rest = build_parser().parse_known_args(argv)
    try:
        if options.verify and not options.sweep:
            raise ConfigError("--verify K compiles the best K of --sweep; give both")
        overrides = parse_overrides(rest)
        plan = read_run(options.config, options.device_num, overrides)
        profile = load_profile(options.device)
        out = options.out or ROOT / "output" / "dryrun" / Path(options.config).stem
        if options.compare:
            return compare(options, plan, profile)
        if options.sweep:
            return run_sweep(options, plan, overrides, profile, out)
        return dry_run(options, plan, overrides, profile, out)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (StandInError, OSError) as error:
        sentence = of_files(error) if isinstance(error, OSError) else None
        print(f"error: {sentence or error}", file=sys.stderr)
        return TOOL_FAILURE
    except Exception:
        traceback.print_exc()
        return TOOL_FAILURE


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stops the children, as Ctrl-C does
    sys.exit(exit_code_of(main))
