"""Hold the cost model against published runs of V3-class models, and a measured step against its measured operators.

    python benchmarks/dryrun/published.py [--runs OTHER.yaml] [--only ID ...] [--causes] [--fit]

One row a run with the signed error of the estimate; a summary as the last line; exit code 1 when a goal is missed.
Goals: every bfloat16 run that the constant was not fitted on within 10 %; mxfp8 runs of the table in the published
order, and the steps of the published ablation of the right sign and within a factor of two; the measured step within
10 %. `--fit` looks for the fitted constant again. Runs without a layout cannot be estimated.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from measured_step import measured_and_estimated  # noqa: E402

from mindformers_ext.config.run import Run, read_run  # noqa: E402
from mindformers_ext.config.yaml_files import load_yaml  # noqa: E402
from mindformers_ext.dryrun.cost_model import Costs, PlanCost, estimate  # noqa: E402
from mindformers_ext.dryrun.device_profile import DeviceProfile, load_profile  # noqa: E402
from mindformers_ext.dryrun.plan import Plan, Software  # noqa: E402
from mindformers_ext.dryrun.planner import balanced  # noqa: E402
from mindformers_ext.dryrun.terminal_report import table  # noqa: E402

RUNS = Path(__file__).parent / "published_runs.yaml"
V3 = ROOT / "research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml"
MODELS = {
    "v3": {"moe_config.shared_expert_split": "width"},
    # each token chooses eight experts in a row: those of a machine, as AutoModel's fake gate deals them
    "v3-in-a-row": {
        "moe_config.shared_expert_split": "width",
        "moe_config.n_group": 32,
        "moe_config.topk_group": 1,
    },
    "kimi-k2": {
        "moe_config.shared_expert_split": "width",
        "model.model_config.num_heads": 64,
        "model.model_config.n_kv_heads": 64,
        "model.model_config.vocab_size": 163840,
        "moe_config.expert_num": 384,
        "moe_config.n_group": 1,
        "moe_config.topk_group": 1,
        "moe_config.first_k_dense_replace": 1,
    },
}
WITHIN, FACTOR = 0.10, 2.0
HEADERS = ["run", "device", "devices", "precision", "published", "estimated", "error", ""]


@dataclass
class Compared:
    """A run and its estimate, TFLOP/s a device."""

    row: dict[str, Any]
    cost: PlanCost
    estimated: float

    @property
    def error(self) -> float:
        """Of the estimate."""
        return self.estimated / self.row["tflops"] - 1

    @property
    def precision(self) -> str:
        """Of the products."""
        return self.row.get("precision", "bf16")

    @property
    def role(self) -> str:
        """What the run is for."""
        if self.row.get("fit"):
            return "fitted"
        return "predicted" if self.row.get("guide", True) else "predicted, found later"


def plan_of(row: dict[str, Any], software: dict[str, dict], base: Run, profile: DeviceProfile) -> Plan:
    """The plan of a row of published_runs.yaml."""
    length = row.get("sequence", 4096)
    sizes = MODELS[row.get("model", "v3")] | {
        "model.model_config.mtp_depth": row.get("mtp", 1),
        "model.model_config.seq_length": length,
        "model.model_config.max_position_embeddings": length,
    }
    model = base.changed(sizes.items()).model
    layout = {"tp": 1, "pp": 1, "cp": 1, "vp": 1, "ep": 1} | row["layout"]
    dp = row["devices"] // (layout["tp"] * layout["pp"] * layout["cp"])
    settings = software[row["software"]] | row.get("switches", {})
    settings["overlaps"] = frozenset(settings.get("overlaps", ()))
    recompute = row.get("recompute", [])
    whole = recompute == "full"
    plan = Plan(
        model=model,
        device_num=row["devices"],
        dp=dp,
        cp=layout["cp"],
        mp=layout["tp"],
        pp=layout["pp"],
        ep=layout["ep"],
        batch_size=row["micro_batch"],
        micro_batches=row["global_batch"] // (dp * row["micro_batch"] * row.get("accumulation", 1)),
        recomputed=frozenset(range(model.layers_in_all)) if whole else frozenset(),
        parts=frozenset() if whole else frozenset(recompute),
        dispatcher="alltoall",
        sequence_parallel=layout["tp"] > 1,
        shard_optimizer=True,
        shard_gradients=settings.get("gathers", 1) > 1,  # FSDP
        node=profile.devices_per_node,
        software=Software(**settings, splits_any_axis=True, low_precision=row.get("precision", "bf16") != "bf16"),
    )
    return balanced(Costs(plan, profile), layout["vp"], least=0)


def compare(rows: list[dict], software: dict[str, dict], constants: dict[str, float]) -> Iterator[Compared]:
    """Estimate rows, with other constants in their profiles."""
    base = read_run(V3)
    for row in rows:
        profile = replace(load_profile(row["device"]), **constants)
        cost = estimate(plan_of(row, software, base, profile), profile)
        yield Compared(row, cost, cost.mfu * profile.peak_tflops)


def fit(rows: list[dict], software: dict[str, dict]) -> dict[str, float]:
    """The fitted constant: the share of the peak with the smallest largest error of the fitted runs."""
    fitted = [row for row in rows if row.get("fit")]
    choices = [{"matmul_efficiency": i / 100} for i in range(50, 81, 2)]
    return min(choices, key=lambda c: max(abs(found.error) for found in compare(fitted, software, c)))


def wrong_order(found: list[Compared]) -> list[str]:
    """Pairs of the table's mxfp8 runs that the estimate ranks the other way."""
    ranked = sorted(
        (c for c in found if c.precision == "mxfp8" and c.row.get("guide", True)), key=lambda c: -c.row["tflops"]
    )
    pairs = itertools.combinations(ranked, 2)
    return [f"{a.row['id']} < {b.row['id']}" for a, b in pairs if a.estimated <= b.estimated]


def main() -> int:
    """Print the comparison; 1 when a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, default=RUNS, help="rows of another file, with its own `software` or this one's"
    )
    parser.add_argument("--only", nargs="+", metavar="ID", help="these runs only")
    parser.add_argument("--causes", action="store_true", help="show what the estimate spends a step on")
    parser.add_argument("--fit", action="store_true", help="look for the fitted constant again")
    options = parser.parse_args()
    given, own = load_yaml(options.runs), load_yaml(RUNS)
    software = own["software"] | given.get("software", {})
    if options.fit:
        print("smallest largest error:", fit(own["runs"], software))
        return 0
    rows = [row for row in given["runs"] if options.only is None or row["id"] in options.only]
    found = list(compare(rows, software, {}))
    print(table(HEADERS, [shown(c) for c in found]))
    for c in found if options.causes else []:
        causes = ", ".join(
            f"{cause} {seconds / c.cost.step_seconds:.0%}" for cause, seconds in c.cost.seconds_by_cause.items()
        )
        print(f"{c.row['id']}: {c.cost.step_seconds:.2f} s: {causes}")
    missed = [
        f"{c.row['id']} {c.error:+.1%}"
        for c in found
        if c.precision == "bf16" and not c.row.get("fit") and abs(c.error) > WITHIN
    ]
    if swapped := wrong_order(found):
        print("\nmxfp8 runs in another order than published: " + "; ".join(swapped))
        missed.append(f"{len(swapped)} pairs of mxfp8 runs in the wrong order")
    if options.runs == RUNS and options.only is None:
        missed += ablation(given["ablation"], software)
        measured, estimated = measured_and_estimated()
        error = estimated / measured - 1
        print(
            f"\nmeasured step of two layers on an H100: {measured:.1f} ms; from its operators {estimated:.1f} "
            f"({error:+.1%})"
        )
        missed += [f"measured step {error:+.1%}"] if abs(error) > WITHIN else []
    errors = [abs(c.error) for c in found if c.precision == "bf16" and not c.row.get("fit")]
    mean = (
        f"mean error of {len(errors)} predicted bf16 runs {sum(errors) / len(errors):.1%}" if errors else "no bf16 run"
    )
    print(f"\nsummary: {mean}; " + (f"missed: {'; '.join(missed)}" if missed else "every goal is met"))
    return int(bool(missed))


def shown(c: Compared) -> list[str]:
    """A run's row."""
    row = c.row
    return [row["id"], row["device"], row["devices"], c.precision, f"{row['tflops']:.4g}", f"{c.estimated:.4g}"] + [
        f"{c.error:+.1%}",
        c.role,
    ]


def ablation(given: dict[str, Any], software: dict[str, dict]) -> list[str]:
    """What each published step of one system brought, and what it brings by the estimate; the steps that miss."""
    state: dict[str, Any] = given["run"]
    rows = []
    for step in given["steps"]:
        switches = state.get("switches", {}) | step.get("switches", {})
        state = state | {k: v for k, v in step.items() if k != "name"} | {"switches": switches}
        rows.append(state | {"id": step["name"]})
    found = list(compare(rows, software, {}))
    lines, missed = [], []
    for before, after in itertools.pairwise(found):
        gains = [after.row["tflops"] / before.row["tflops"] - 1, after.estimated / before.estimated - 1]
        ratio = gains[1] / gains[0]
        right = 1 / FACTOR <= ratio <= FACTOR
        lines.append([after.row["id"], f"{gains[0]:+.1%}", f"{gains[1]:+.1%}", "" if right else "missed"])
        if not right:
            missed.append(f"ablation: {after.row['id']} {gains[1]:+.1%} for {gains[0]:+.1%}")
    print("\n" + table(["ablation", "published", "estimated", ""], lines))
    ends = [f"{c.estimated:.0f} TFLOP/s (published {c.row['tflops']:.0f})" for c in (found[0], found[-1])]
    print(f"from {ends[0]} to {ends[1]}")
    return missed


if __name__ == "__main__":
    sys.exit(main())
