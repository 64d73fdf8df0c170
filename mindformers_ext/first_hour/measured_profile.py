"""A device profile (`dryrun --device`) from what was measured, over the profile of the device that it should be."""

import statistics
from typing import Any

import yaml

from mindformers_ext.config.yaml_files import load_yaml
from mindformers_ext.dryrun.device_profile import DEFAULT_PROFILE
from mindformers_ext.dryrun.transfers import wire_factor
from mindformers_ext.rank_compiler.roofline import ATTENTION, MEMORY, PRODUCT

LARGEST = 5  # operators of a kind whose rate is taken: small ones spend their time starting
OPERATOR_KEYS = ("operator", "attributes", "dtypes", "shapes", "kind")


def measured_profile(
    name: str, peak_tflops: float | None, operators: list[dict[str, Any]], collectives: list[dict[str, Any]]
) -> dict[str, Any]:
    """The profile's keys and numbers; what was not measured keeps its assumption.

    `peak_tflops` replaces the peak of the device that the assumptions are of.
    """
    values = load_yaml(DEFAULT_PROFILE) | {"name": name}
    if peak_tflops is not None:
        values["peak_tflops"] = round(peak_tflops, 4)
    ran = [record for record in operators if record.get("seconds")]
    peak = values["peak_tflops"] * 1e12
    for kind, key in ((PRODUCT, "matmul_efficiency"), (ATTENTION, "attention_efficiency")):
        if rate := _rate(ran, kind, "flops"):
            values[key] = round(rate / peak, 4)
    if rate := _rate(ran, MEMORY, "bytes"):
        values["hbm_gb_per_s"] = round(rate / 1e9, 3)
        if "memory_efficiency" in values:
            values["memory_efficiency"] = 1.0
    if collectives:
        values["latency_us"] = round(1e6 * min(record["seconds"] for record in collectives), 3)
        values["node_link_gb_per_s"] = round(_link_rate(collectives) / values["network_efficiency"] / 1e9, 3)
    values["operators"] = [operator_record(record) for record in ran]
    return values


def _rate(records: list[dict[str, Any]], kind: str, amount: str) -> float | None:
    """What the largest operators of a kind reach a second, the median."""
    largest = sorted((r for r in records if r["kind"] == kind and r[amount]), key=lambda r: -r[amount])[:LARGEST]
    return statistics.median(r[amount] / r["seconds"] for r in largest) if largest else None


def _link_rate(records: list[dict[str, Any]]) -> float:
    """Bytes a second over one link to a neighbour, from the largest collectives, the median."""
    largest = max(record["bytes"] for record in records)
    rates = [
        record["bytes"] * wire_factor(record["operation"], record["group"]) / record["seconds"] / (record["group"] - 1)
        for record in records
        if record["bytes"] == largest
    ]
    return statistics.median(rates)


def operator_record(record: dict[str, Any]) -> dict[str, Any]:
    """An operator as the profile lists it: milliseconds, and what it reached."""
    reached = {"tflops": record["flops"] / record["seconds"] / 1e12} if record["flops"] else {}
    reached |= {"gb_per_s": record["bytes"] / record["seconds"] / 1e9}
    return {
        **{key: record[key] for key in OPERATOR_KEYS},
        "ms": round(record["seconds"] * 1e3, 4),
        **{key: round(value, 3) for key, value in reached.items()},
    }


def as_yaml(values: dict[str, Any]) -> str:
    """The profile as a file."""
    head = "# Measured by scripts/first_hour.sh; what it could not measure is the assumption of the default profile.\n"
    return head + yaml.safe_dump(values, sort_keys=False, width=200, allow_unicode=True)
