"""Search the fastest plan of a model on a number of devices, and write its YAML.

    python scripts/plan.py --config research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml \
        --device_num 1024 --global_batch 3840 --write out.yaml

Degrees, chunks, dispatcher, micro-batch size, offsets, recomputation and optimizer shards of the YAML are chosen anew;
all else stays. Exit code: 0 a plan fits, 1 none does (or --explain's does not, or --verify rejects the best).
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import yaml  # noqa: E402
from dryrun import compile_plan, positive  # noqa: E402

from mindformers_ext.config.command_line import parse_overrides  # noqa: E402
from mindformers_ext.config.run import Run, read_run  # noqa: E402
from mindformers_ext.config.strategy_rules import check_plan  # noqa: E402
from mindformers_ext.dryrun.cost_model import estimate  # noqa: E402
from mindformers_ext.dryrun.device_profile import DEFAULT_PROFILE, DeviceProfile, load_profile  # noqa: E402
from mindformers_ext.dryrun.frontier import plot_frontier  # noqa: E402
from mindformers_ext.dryrun.plan import DISPATCHERS, Plan  # noqa: E402
from mindformers_ext.dryrun.planner import Candidate, Found, Space, dispatchers_of, overrides, search  # noqa: E402
from mindformers_ext.dryrun.report import FITS, GIB, make_report, memory_limit  # noqa: E402
from mindformers_ext.dryrun.terminal_report import table  # noqa: E402
from mindformers_ext.dryrun.uncertainty import likely  # noqa: E402
from mindformers_ext.errors import ConfigError, exit_code_of  # noqa: E402
from mindformers_ext.files.atomic import write_text  # noqa: E402

HEADERS = ["", "dp", "cp", "mp", "pp", "chunks", "ep", "dispatcher", "batch", "micro", "again", "GiB", "step s", "MFU"]
HEADERS += ["likely", "bound by"]


def build_parser() -> argparse.ArgumentParser:
    """The command line; everything else is --section.key value over --config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML of the run")
    parser.add_argument("--device_num", type=positive, required=True)
    parser.add_argument("--global_batch", type=positive, help="sequences of a step (default: the YAML's)")
    parser.add_argument(
        "--device", default=DEFAULT_PROFILE, help="device profile: a YAML file, or a name as a2, a3, h100"
    )
    parser.add_argument("--memory", type=float, help="GiB that a rank may use (default: the YAML's, or the profile's)")
    parser.add_argument("--top", type=positive, default=10, help="plans shown")
    parser.add_argument("--dispatchers", nargs="+", choices=DISPATCHERS[:3], help="default: all that the YAML can name")
    parser.add_argument("--assume", nargs="+", default=[], metavar="PURPOSE", help="collectives taken as overlapped")
    parser.add_argument("--write", type=Path, help="file for the YAML of the best plan that is not rejected")
    parser.add_argument("--verify", type=int, default=0, metavar="K", help="compile the best K at level memory")
    parser.add_argument("--explain", help="a YAML whose place beside the best is explained")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "output" / "plan", help="folder for the plot and compiled ranks"
    )
    parser.add_argument("--register_path", default="research/deepseek3", help="folder of the model's Python files")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a rank may take")
    parser.add_argument("--jobs", type=positive, default=1, help="ranks compiled at a time")
    return parser


def row_of(index: int, candidate: Candidate) -> list:
    """One line of the table."""
    p, c = candidate.plan, candidate.cost
    low, high = likely(c.mfu)
    return [index, p.dp, p.cp, p.mp, p.pp, p.chunks, p.ep, p.dispatcher if p.ep > 1 else "-", p.batch_size] + [
        p.micro_batches,
        len(p.recomputed),
        f"{c.memory_bytes / GIB:.1f}",
        f"{c.step_seconds:.2f}",
        f"{c.mfu:.1%}",
        f"{low:.0%}-{high:.0%}",
        c.bound,
    ]


def causes_text(candidate: Candidate) -> str:
    """Where a step's time goes."""
    step = candidate.cost.step_seconds
    return ", ".join(f"{cause} {seconds / step:.0%}" for cause, seconds in candidate.cost.seconds_by_cause.items())


def show(found: Found, limit: float) -> None:
    """Print the best and where their time goes."""
    print(
        f"{found.families} choices of degrees, micro-batch, dispatcher and shards are legal ({found.illegal} layouts "
        f"are not); {found.small} may fit in {limit / GIB:.0f} GiB; {found.tried} could be among the best: tried"
    )
    if found.best:
        print(table(HEADERS, [row_of(i, c) for i, c in enumerate(found.best, 1)]))
        for i, candidate in enumerate(found.best, 1):
            print(f"{i}: {causes_text(candidate)}")


def verified(options, base: Run, found: Found, limit: float, profile: DeviceProfile) -> list[Candidate]:
    """The best, without those of the first --verify that the compiler refuses or whose memory it finds too large."""
    kept = []
    for i, candidate in enumerate(found.best, 1):
        if i <= options.verify:
            chosen = overrides(base, candidate.plan)
            run = base.changed(chosen, options.device_num)
            stage = run.devices_per_stage
            options.level = "memory"
            ranks = [s * stage for s in range(run.pp)]
            results = compile_plan(options, run, options.overrides + chosen, ranks, options.out / f"candidate_{i}")
            report = make_report(run, replace(profile, memory_gib=limit / GIB, usable_memory=1.0), [], None, results)
            print(f"{i}: {'kept' if report['exit_code'] == FITS else 'rejected'}: {report['verdict']}")
            if report["exit_code"] != FITS:
                continue
        kept.append(candidate)
    return kept


def explain(options, base: Run, found: Found, limit: float, profile: DeviceProfile) -> int:
    """Say why a YAML is not among the best; 1 when it is illegal or does not fit."""
    other = read_run(options.explain)
    if violations := check_plan(other):
        print("\n".join(f"{options.explain}: {v.key}: {v.sentence}" for v in violations))
        return 1
    theirs = Candidate(Plan.of(other), estimate(other, profile))
    print(f"\n{options.explain} on {other.device_num} devices, {other.global_batch} sequences a step:")
    rows = [row_of("given", theirs)] + [row_of("best", c) for c in found.best[:1]]
    print(table(HEADERS, rows))
    for name, c in [("given", theirs), *(("best", c) for c in found.best[:1])]:
        print(f"{name}: {causes_text(c)}")
    fits = theirs.cost.memory_bytes <= limit
    if not fits:
        print(f"it does not fit: {theirs.cost.memory_bytes / GIB:.1f} GiB of {limit / GIB:.1f}")
    if not found.best:
        return int(not fits)
    best, per_device = found.best[0], lambda c: c.cost.tokens_per_s / c.plan.device_num
    print(f"the best is {per_device(best) / per_device(theirs) - 1:+.1%} faster for each device")
    for name, changed in one_change_each(theirs.plan, best.plan):
        cost = estimate(changed, profile)
        note = "" if cost.memory_bytes <= limit else f", but needs {cost.memory_bytes / GIB:.1f} GiB"
        print(f"- with {name} of the best alone: {theirs.cost.step_seconds / cost.step_seconds - 1:+.1%}{note}")
    return int(not fits)


def one_change_each(given: Plan, best: Plan):
    """Pairs (what is changed, the given plan with that of the best), where that alone is possible."""
    same_stages = (given.pp, given.chunks) == (best.pp, best.chunks)
    changes = {
        "micro-batch size": {
            "batch_size": best.batch_size,
            "micro_batches": given.micro_batches * given.batch_size // best.batch_size,
        },
        "dispatcher": {"dispatcher": best.dispatcher, "software": best.software},
        "expert_parallel": {"ep": best.ep},
        "offsets and recomputation": {"layers": best.layers, "recomputed": best.recomputed} if same_stages else {},
        "no recomputation": {"recomputed": frozenset()},
        "optimizer shards": {
            "shard_gradients": best.shard_gradients,
            "optimizer_shard_size": best.optimizer_shard_size,
        },
    }
    for name, values in changes.items():
        changed = replace(given, **values)
        possible = changed.devices_per_stage % changed.ep == 0 and changed.global_batch == given.global_batch
        if values and possible and any(getattr(given, k) != v for k, v in values.items()):
            yield name, changed


def yaml_text(base: Run, candidate: Candidate, options, limit: float) -> str:
    """A complete YAML with what is estimated of it at its head."""
    run = base.changed(overrides(base, candidate.plan), options.device_num)
    cost, (low, high) = candidate.cost, likely(candidate.cost.mfu)
    head = [
        f"# Written by scripts/plan.py from {Path(options.config).name} for {options.device_num} devices and "
        f"{run.global_batch} sequences a step.",
        f"# Estimated on {options.profile_name}: {cost.step_seconds:.2f} s a step, MFU {cost.mfu:.1%} ({low:.0%} to "
        f"{high:.0%} with the errors on published runs), {cost.memory_bytes / GIB:.1f} GiB of {limit / GIB:.0f} on the "
        "fullest rank.",
        f"# {causes_text(candidate)}",
    ]
    return "\n".join([*head, yaml.safe_dump(run.values, sort_keys=False, default_flow_style=None, width=120)])


def plan(argv: list[str] | None = None) -> int:
    """Search, show, and do what is asked with the best."""
    options, rest = build_parser().parse_known_args(argv)
    options.overrides = parse_overrides(rest)
    base = read_run(options.config, None, options.overrides)
    profile = load_profile(options.device)
    options.profile_name = profile.name
    limit = options.memory * GIB if options.memory else memory_limit(base, profile)
    batch = options.global_batch or base.global_batch
    space = Space(dispatchers=tuple(options.dispatchers or dispatchers_of(base)), overlaps=frozenset(options.assume))
    found = search(base, profile, options.device_num, batch, limit, space, options.top)
    show(found, limit)
    options.out.mkdir(parents=True, exist_ok=True)
    if found.points:
        plot_frontier(found, limit, options.out / "frontier.png")
        print(f"memory and time of all that was estimated: {options.out / 'frontier.png'}")
    code = 0
    if options.explain:
        code = explain(options, base, found, limit, profile)
    best = verified(options, base, found, limit, profile) if options.verify else found.best
    if options.write and best:
        write_text(options.write, yaml_text(base, best[0], options, limit))
        print(f"wrote {options.write}")
    if not best:
        print(f"no plan of {options.device_num} devices and {batch} sequences fits in {limit / GIB:.1f} GiB")
    return code or int(not best)


def main() -> int:
    """`plan`, with its faults as one sentence."""
    try:
        return plan()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(exit_code_of(main))
