"""Join what was checked, estimated and compiled into one report: a dictionary for JSON and tables for a terminal."""

from collections.abc import Iterable
from dataclasses import asdict
from math import prod
from typing import Any

from mindformers_ext.config.run import Run
from mindformers_ext.config.run_rules import Violation
from mindformers_ext.dryrun.cost_model import PlanCost
from mindformers_ext.dryrun.device_profile import DeviceProfile
from mindformers_ext.dryrun.parameters import Weight, model_weights, stored_shape
from mindformers_ext.dryrun.rooflines import balanced_rows, roofline_record
from mindformers_ext.dryrun.transfers import wire_factor
from mindformers_ext.dryrun.uncertainty import likely, sensitivities
from mindformers_ext.rank_compiler.operator_rules import VIOLATION
from mindformers_ext.rank_compiler.rank_pool import COMPILED, REFUSED, RankResult
from mindformers_ext.rank_compiler.roofline import Work

FITS, DOES_NOT_FIT, TOOL_FAILURE = 0, 1, 2  # exit codes
GIB = 2**30


def memory_limit(plan: Run, profile: DeviceProfile) -> float:
    """Bytes a rank may plan: the YAML's context.max_device_memory, or the profile's share of the device."""
    given = plan.sections.context.max_device_memory
    return float(given.removesuffix("GB")) * GIB if given else profile.memory_limit_bytes


def make_report(
    plan: Run,
    profile: DeviceProfile,
    violations: list[Violation],
    cost: PlanCost | None,
    results: list[RankResult],
) -> dict[str, Any]:
    """Everything that is known about a plan; `cost` is None and `results` empty when it is illegal."""
    limit = memory_limit(plan, profile)
    ranks = [rank_record(plan, profile, cost, result) for result in results]
    code = exit_code(violations, cost, results, limit)
    return {
        "config": plan.path,
        "device_num": plan.device_num,
        "degrees": {k: getattr(plan, k) for k in ("dp", "cp", "mp", "pp", "ep", "micro_batches", "global_batch")},
        "violations": [asdict(v) for v in violations],
        "assumptions": asdict(profile),
        "memory_limit_bytes": limit,
        "estimate": estimate_record(plan, profile, cost) if cost else None,
        "compiled_micro_batches": compiled_micro_batches(plan),
        "ranks": ranks,
        "audit": joined_audit(results),
        "parameter_check": check_parameters(plan, results) if results else None,
        "exit_code": code,
        "verdict": verdict(code, violations, cost, results, limit),
    }


def compiled_micro_batches(plan: Run) -> int:
    """How many micro-batches of a step are compiled: two for each stage of a pipeline, if there are more.

    The compiler's time and memory grow with them (480 take more than 20 GB); what a card holds at once does not, nor do
    the operators, except where all forward passes come before the first backward.
    """
    if plan.pp == 1 or plan.scheduler == "gpipe":
        return plan.micro_batches
    return min(plan.micro_batches, 2 * plan.pp)


def verdict(code: int, violations: list, cost: PlanCost | None, results: list[RankResult], limit: float) -> str:
    """The exit code in one sentence, with the numbers that decide it."""
    failed = [f"rank {r.rank} (stage {r.stage}) {r.status}" for r in results if r.status != COMPILED]
    if code == TOOL_FAILURE:
        return f"the tool failed: {', '.join(failed)}"
    if violations:
        return f"illegal: {len(violations)} of the strategy's rules are broken"
    if failed:
        return f"illegal: {', '.join(failed)}"
    if broken := broken_rules(results):
        return f"illegal: {len(broken)} uses of operators break what Ascend documents, {broken[0]['operator']} first"
    peak = fullest(cost, results)
    if peak is None:
        return "compiled"
    size, who = peak
    return f"{'fits' if code == FITS else 'does not fit'}: {size / GIB:.1f} GiB {who}, the limit is {limit / GIB:.1f}"


def fullest(cost: PlanCost | None, results: list[RankResult]) -> tuple[float, str] | None:
    """Most bytes that a rank needs, and who says so: MindSpore's plan, or the estimate for stages that have none."""
    found = [(r.memory["actual_peak_bytes"], planned_for(r)) for r in results if r.memory]
    planned = {r.stage for r in results if r.memory}
    stages = [s for s in cost.stages if s.stage not in planned] if cost else []
    found += [(s.memory_bytes, f"estimated for stage {s.stage}") for s in stages]
    return max(found, default=None)


def planned_for(result: RankResult) -> str:
    """Whose plan of the memory it is, and what it takes for granted."""
    balanced = ", if all experts get as many rows" if result.compiled.get("balanced_experts") else ""
    return f"MindSpore plans for rank {result.rank}{balanced}"


def estimate_record(plan: Run, profile: DeviceProfile, cost: PlanCost) -> dict[str, Any]:
    """The cost model's numbers, how far they may be off, and a readable list of each stage's layers."""
    record = cost.to_json() | {"likely_mfu": likely(cost.mfu), "sensitivities": sensitivities(plan, profile)}
    for stage in record["stages"]:
        stage["layer_names"] = layer_names(plan, stage["stage"])
    return record


def exit_code(violations: list, cost: PlanCost | None, results: list[RankResult], limit: float) -> int:
    """0 fits, 1 illegal, refused by the compiler or too large, 2 a compiler process failed."""
    if any(r.status not in (COMPILED, REFUSED) for r in results):
        return TOOL_FAILURE
    peak = fullest(cost, results)
    too_large = peak is not None and peak[0] > limit
    refused = any(r.status == REFUSED for r in results)
    return DOES_NOT_FIT if violations or too_large or refused or broken_rules(results) else FITS


def joined_audit(results: list[RankResult]) -> list[dict[str, Any]]:
    """What the compiled ranks run (`operator_rules.Finding`): equal findings once, with the ranks and all places."""
    joined: dict[tuple, dict[str, Any]] = {}
    for result in results:
        for finding in result.compiled.get("audit", []):
            key = tuple(finding[k] for k in ("operator", "attributes", "dtypes", "verdict", "demand"))
            known = joined.setdefault(key, finding | {"count": 0, "places": [], "ranks": []})
            known["count"] += finding["count"]
            known["places"] += [place for place in finding["places"] if place not in known["places"]]
            known["ranks"].append(result.rank)
    return list(joined.values())


def broken_rules(results: list[RankResult]) -> list[dict[str, Any]]:
    """Uses of operators that a document forbids."""
    return [finding for finding in joined_audit(results) if finding["verdict"] == VIOLATION]


def rank_record(plan: Run, profile: DeviceProfile, cost: PlanCost | None, result: RankResult) -> dict[str, Any]:
    """One compiled rank: its bytes by kind, its collectives, its parameter layouts, its operators' time.

    FLOPs are the model's formula. MindSpore's own count (`compiled.flops`) has no grouped matmul in it and the masked
    half of attention.
    """
    record = result.to_json() | {"layers": layer_names(plan, result.stage)}
    if result.status != COMPILED:
        return record
    compiled = result.compiled
    record["bytes"] = bytes_by_kind(compiled)
    record["parameters"] = sum(prod(compiled["parameters"][name]["shape"]) for name in compiled["weights"])
    record["flops_per_step"] = cost.stages[result.stage].flops_per_step if cost else None
    record["collectives"] = [collective_record(c, profile) for c in compiled["collectives"]]
    record["layouts"] = layout_table(compiled)
    works = [Work(**work) for work in compiled.get("operators", [])]
    record["roofline"] = roofline_record(works, profile, balanced_rows(plan), compiled_micro_batches(plan))
    return record


def bytes_by_kind(compiled: dict[str, Any]) -> dict[str, int]:
    """Bytes stored on a rank: weights, gradient buffers, optimizer states, and the rest (buffers, counters)."""
    weights = set(compiled["weights"])
    total = dict.fromkeys(("weights", "gradients", "optimizer", "other"), 0)
    for name, parameter in compiled["parameters"].items():
        owner = next((name[i + 1 :] for i, c in enumerate(name) if c == "." and name[i + 1 :] in weights), None)
        if name in weights:
            kind = "weights"
        elif owner is None:
            kind = "other"
        else:
            kind = "gradients" if name.startswith("accu_grads") else "optimizer"
        total[kind] += parameter["bytes"]
    return total


def collective_record(collective: dict[str, Any], profile: DeviceProfile) -> dict[str, Any]:
    """A compiled collective with its group's size, where it runs, and the bytes a rank sends for it in a step."""
    ranks = collective["ranks"]
    size = collective["bytes"]
    factor = 0 if collective["kind"] == "Receive" else wire_factor(collective["kind"], len(ranks))
    sent = None if size is None else size * collective["count"] * factor
    across = len({r // profile.devices_per_node for r in ranks}) > 1
    kept = {k: collective[k] for k in ("kind", "purpose", "dtype", "bytes", "count")}
    return kept | {"group_size": len(ranks), "across_nodes": across, "sent_bytes": sent}


def summed_collectives(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collectives of a rank summed over tensors: one row for each kind, group size and place."""
    rows: dict[tuple, dict] = {}
    for record in records:
        key = (record["kind"], record["group_size"], record["across_nodes"])
        row = rows.setdefault(key, dict(zip(("kind", "group_size", "across_nodes"), key, strict=True)) | ZERO_ROW)
        row["count"] += record["count"]
        row["bytes"] += (record["bytes"] or 0) * record["count"]
        row["sent_bytes"] += record["sent_bytes"] or 0
        row["dynamic"] += record["bytes"] is None
    return sorted(rows.values(), key=lambda r: -r["sent_bytes"])


ZERO_ROW = {"count": 0, "bytes": 0, "sent_bytes": 0, "dynamic": 0}


def layout_table(compiled: dict[str, Any]) -> list[dict[str, Any]]:
    """Every weight of a rank: whole shape, device matrix, tensor map, and the shape stored here."""
    rows = []
    for name in compiled["weights"]:
        layout = compiled["layouts"][name]
        rows.append(
            {
                "name": name,
                "full_shape": layout["full_shape"],
                "device_matrix": layout["device_matrix"],
                "tensor_map": layout["tensor_map"],
                "stored_shape": compiled["parameters"][name]["shape"],
            }
        )
    return rows


def check_parameters(plan: Run, results: list[RankResult]) -> dict[str, Any]:
    """Compare the compiled ranks' weights, counted once, with the model's; the differences by name."""
    expected = {w.name: w for w in model_weights(plan) if w.trainable}
    seen: dict[str, int] = {}
    differences = []
    stages = {r.stage for r in results if r.status == COMPILED}
    for result in results:
        if result.status == COMPILED:
            seen |= {n: prod(result.compiled["layouts"][n]["full_shape"]) for n in result.compiled["weights"]}
            differences += weight_differences(plan, result, expected)
    wanted = sum(w.size for w in expected.values() if w.stage in stages)
    if sum(seen.values()) != wanted:
        differences.append(f"the compiled stages hold {sum(seen.values())} values, the model has {wanted} there")
    return {"stages": sorted(stages), "values": sum(seen.values()), "expected": wanted, "differences": differences}


def weight_differences(plan: Run, result: RankResult, expected: dict[str, Weight]) -> list[str]:
    """Sentences about weights of one rank that are missing, unknown, or stored with another shape than planned."""
    held = set(result.compiled["weights"])
    planned = {name for name, weight in expected.items() if weight.stage == result.stage}
    where = f"rank {result.rank} (stage {result.stage})"
    found = [f"{where} lacks {name}" for name in sorted(planned - held)]
    found += [f"{where} holds {name}, which is not planned there" for name in sorted(held - planned)]
    for name in sorted(planned & held):
        actual, wanted = result.compiled["parameters"][name]["shape"], list(stored_shape(expected[name], plan))
        if actual != wanted:
            found.append(f"{where} stores {name} as {actual}, planned {wanted}")
    return found


def layer_names(plan: Run, stage: int) -> str:
    """'58-60 + MTP', with two chunks '28-29, 58-60 + MTP'."""
    runs = [plan.pipeline.layers_of(stage, chunk) for chunk in range(plan.chunks)]
    texts = []
    for layers in runs:
        main = [i for i in layers if i < plan.model.num_layers]
        texts.append(f"{main[0]}-{main[-1]}" if len(main) > 1 else f"{main[0]}")
    return ", ".join(texts) + (" + MTP" if plan.layers_of(stage)[-1] >= plan.model.num_layers else "")
