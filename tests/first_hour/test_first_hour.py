"""The first hour without a card: its steps at small sizes, and (slow) its whole way."""

import json
import subprocess
from pathlib import Path

import mindspore.train.mind_ir_pb2 as pb
import numpy as np
import pytest

from mindformers_ext.dryrun.device_profile import load_profile
from mindformers_ext.first_hour import run
from mindformers_ext.first_hour.collective_times import OPERATIONS, groups, on_cpu
from mindformers_ext.first_hour.environment import check_environment
from mindformers_ext.first_hour.measured_profile import as_yaml, measured_profile
from mindformers_ext.first_hour.one_operator import bfloat16_values, distinct_uses
from mindformers_ext.first_hour.operator_checks import check_operators
from mindformers_ext.first_hour.report import loss_differences, render_html, verdict_of
from mindformers_ext.first_hour.worker import TOLERANCES, compared
from mindformers_ext.rank_compiler.roofline import ATTENTION, MEMORY, PRODUCT
from tests.helpers.mindir_model import Model

ROOT = Path(__file__).parents[2]


def test_values_that_bfloat16_holds_are_the_nearest():
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    held = bfloat16_values(values)
    assert not np.any(held.view(np.uint32) & 0xFFFF)
    assert np.all(np.abs(held - values) <= np.abs(values) * 2**-8)
    assert np.array_equal(bfloat16_values(held), held)


def test_results_are_compared_by_the_largest_number():
    want = np.array([100.0, 0.001], np.float32)
    allowed = TOLERANCES["bfloat16"]
    assert compared([want + 50 * allowed], [want], ["bfloat16"])["agrees"]
    assert not compared([want + 150 * allowed], [want], ["bfloat16"])["agrees"]
    assert not compared([np.array([np.nan, 0.001], np.float32)], [want], ["float"])["agrees"]
    ids = np.arange(200)
    one_other = np.where(ids == 7, 0, ids)
    assert compared([one_other], [ids], ["int32"])["agrees"]
    assert not compared([ids[::-1]], [ids], ["int32"])["agrees"]
    assert "shape" in compared([ids[:3]], [ids], ["int32"])["error"]


def test_operators_are_tried_one_by_one_and_none_twice(tmp_path):
    """A product, a sum, and an operator that no device has, which stops nobody."""
    model = Model()
    a, b = model.given("a", "float", (8, 16)), model.given("b", "float", (4, 16))
    no, yes = model.constant("no", False), model.constant("yes", True)
    model.apply("MatMul", [a, b, no, yes], "product", (8, 4))
    model.apply("NoSuchOperator", ["product"], "none", (8, 4))
    model.apply("Mul", ["product", "product"], "out", (8, 4))
    model.apply("Reshape", ["out"], "view", (32,))
    model.proto.MergeFrom(pb.ModelProto(ir_version="1.1", mind_ir_version=3, model_version="2.9.0", little_endian=True))
    graph = tmp_path / "graph.mindir"
    graph.write_bytes(model.proto.SerializeToString())
    assert [use.operator.name for use in distinct_uses([graph])] == ["MatMul", "NoSuchOperator", "Mul"]
    found = check_operators([graph], "CPU", tmp_path / "out")
    product, none, out = found
    assert product["agrees"] and product["seconds"] > 0 and product["flops"] == 2 * 8 * 4 * 16
    assert out["agrees"] and "failed" in none
    kept = tmp_path / "out" / "operators.jsonl"
    with kept.open("a") as file:
        file.write('{"cut')
    assert check_operators([graph], "CPU", tmp_path / "out") == found, "from the file"
    assert len(kept.read_text().splitlines()) == 3


def test_collectives_are_timed_and_right():
    assert groups(8) == [2, 4, 8] and groups(6) == [2, 6] and groups(3) == [3]
    records = on_cpu(2, sizes=(1 << 10, 1 << 12))
    assert {(r["operation"], r["bytes"]) for r in records} == {(o, s) for o in OPERATIONS for s in (1 << 10, 1 << 12)}
    assert all(r["right"] and r["seconds"] > 0 for r in records)


def operator(kind: str, flops: float, moved: float, seconds: float) -> dict:
    names = dict.fromkeys(("operator", "attributes", "dtypes", "shapes", "part"), "x")
    return names | {"kind": kind, "flops": flops, "bytes": moved, "seconds": seconds, "agrees": True, "error": 0.0}


def test_a_measured_profile_is_one_that_the_dry_run_takes(tmp_path):
    records = [
        operator(PRODUCT, 1e12, 1e9, 0.01),
        operator(ATTENTION, 1e12, 1e9, 0.02),
        operator(MEMORY, 0, 1e9, 0.001),
    ]
    records += [{"failed": "no kernel", "kind": PRODUCT}]
    collectives = [
        {"operation": "AllReduce", "group": 2, "bytes": size, "seconds": seconds, "right": True}
        for size, seconds in ((1 << 10, 30e-6), (1 << 28, 0.01))
    ]
    path = tmp_path / "device.yaml"
    path.write_text(as_yaml(measured_profile("mine", 200.0, records, collectives)))
    profile = load_profile(path)
    assert (profile.name, profile.peak_tflops) == ("mine", 200.0)
    assert (profile.matmul_efficiency, profile.attention_efficiency) == (0.5, 0.25)
    assert profile.hbm_gb_per_s == 1000.0 and profile.latency_us == 30.0
    assert profile.node_link_gb_per_s * profile.network_efficiency == pytest.approx((1 << 28) / 0.01 / 1e9, rel=1e-3)
    assert [o["ms"] for o in profile.operators] == [10.0, 20.0, 1.0]


def finished(**changes) -> dict:
    training = {"device": [{"step": 1, "loss": 2.0, "tokens_per_s": 5.0}], "cpu": [{"step": 1, "loss": 2.001}]}
    done = {
        "environment": {"rows": check_environment()},
        "compilation": {"planned": {}, "estimate": {"tokens_per_s": 1.0}},
        "operators": {"records": [operator(PRODUCT, 1e12, 1e9, 0.01)]},
        "collectives": {"records": []},
        "profile": {},
        "training": training,
    }
    return done | changes


def test_the_verdict_names_what_is_wrong():
    sentence, code = verdict_of(finished(), 1e-2)
    assert code == 0 and sentence.startswith("all agrees: 1 operators")
    wrong = operator(PRODUCT, 1, 1, 1) | {"agrees": False, "error": 1.0, "tolerance": 0.1}
    for changes, words in (
        ({"operators": {"records": [wrong, {"failed": "crash"}]}}, "1 operators differ; 1 operators failed"),
        ({"collectives": {"failed": "no link"}}, "collectives was not done (no link)"),
        ({"training": {"device": [{"step": 1, "loss": 2.0}], "cpu": [{"step": 1, "loss": 3.0}]}}, "losses differ"),
    ):
        sentence, code = verdict_of(finished(**changes), 1e-2)
        assert code == 1 and words in sentence


def test_a_step_that_fails_stops_no_other_and_is_done_again(tmp_path, monkeypatch):
    calls, broken = [], [True]

    def first(hour, done):
        calls.append("first")
        if broken:
            raise OSError("no card")
        return {"ok": 1}

    def second(hour, done):
        calls.append("second")
        return {"ok": 2}

    monkeypatch.setattr(run, "STEP_FUNCTIONS", {"first": first, "second": second})
    hour = run.Hour(Path("a.yaml"), 2, False, tmp_path, (), None)
    assert run.do_all(hour) == {"first": {"failed": "OSError: no card"}, "second": {"ok": 2}}
    broken.clear()
    assert run.do_all(hour) == {"first": {"ok": 1}, "second": {"ok": 2}}
    assert calls == ["first", "second", "first"]
    run.do_all(run.Hour(Path("b.yaml"), 2, False, tmp_path, (), None))
    assert calls[3:] == ["first", "second"], "another run's records are not its own"


def test_every_number_of_cards_has_a_layout():
    for cards in range(1, 33):
        layout = run.layout_of(cards)
        degrees = [layout[f"parallel_config.{key}"] for key in ("data_parallel", "model_parallel", "pipeline_stage")]
        assert np.prod(degrees) == cards


def test_a_report_is_html_even_of_failures():
    failures = {step: {"failed": "<why>"} for step in run.STEP_FUNCTIONS}
    verdict, _ = verdict_of(failures, 1e-2)
    report = {"device": "CPU", "ranks": 2, "config": "a.yaml", "estimates": [], "verdict": verdict, **failures}
    page = render_html(report)
    assert "&lt;why&gt;" in page and "<why>" not in page
    assert loss_differences({"device": [{"step": 1, "loss": None}], "cpu": [{"step": 1, "loss": 1.0}]}) == []


@pytest.mark.slow
def test_the_whole_way_on_cpu(tmp_path):
    config = "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny_4p.yaml"
    command = ["bash", "scripts/first_hour.sh", "--cards", "4", "--config", config, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 0, report["verdict"] + done.stderr[-2000:]
    assert len(report["training"]["device"]) == run.STEPS
    assert load_profile(tmp_path / "device.yaml").operators
