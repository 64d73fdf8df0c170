"""On a card: what scripts/first_hour.sh found there. It runs these tests at its end; FIRST_HOUR is its folder."""

import json
import os
from pathlib import Path

import pytest

from mindformers_ext.first_hour.report import loss_differences, operator_verdict
from mindformers_ext.first_hour.run import LOSS_TOLERANCE

pytestmark = pytest.mark.ascend


def record(step: str) -> dict:
    """What a step of the first hour found."""
    folder = Path(os.environ.get("FIRST_HOUR", "output/first_hour"))
    path = folder / f"{step}.json"
    assert path.exists(), f"{path} is not there: run bash scripts/first_hour.sh first"
    return json.loads(path.read_text())


def test_versions_are_those_that_run():
    assert [row["name"] for row in record("environment")["rows"] if row["right"] is False] == []


def test_every_operator_agrees_with_our_cpu_kernels():
    others = [r for r in record("operators")["records"] if operator_verdict(r) != "agrees"]
    assert [(r["identity"], r.get("failed", r.get("error"))) for r in others] == []


def test_collectives_give_what_was_put_in():
    assert [r for r in record("collectives")["records"] if not r["right"]] == []


def test_ten_steps_have_the_losses_of_the_ranks_on_cpu():
    rows = loss_differences(record("training"))
    assert len(rows) == 10 and max(row["difference"] for row in rows) <= LOSS_TOLERANCE


def test_memory_is_within_the_plan():
    planned, measured = record("compilation")["planned"], record("training")["memory"]
    assert measured, "no rank has printed its peak memory: GLOG_v must be 2"
    assert all(measured[rank] <= 1.05 * planned[rank] for rank in planned if rank in measured)
