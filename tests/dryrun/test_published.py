"""The benchmark against published runs, and the range that reports give because of it."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from mindformers_ext.config.run import read_run
from mindformers_ext.dryrun.device_profile import FOLDER, load_profile
from mindformers_ext.dryrun.uncertainty import HIGHEST_ERROR, LOWEST_ERROR, VARIED, likely, sensitivities

ROOT = Path(__file__).parents[2]
FITTED = ("matmul_efficiency", "overlap_cost")
SHARED = (*FITTED, "attention_efficiency", "memory_efficiency", "network_efficiency", "latency_us", "kernel_us")


@pytest.fixture(scope="module")
def published():
    spec = importlib.util.spec_from_file_location("published", ROOT / "benchmarks" / "dryrun" / "published.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


def test_constants_are_the_same_for_all_devices():
    profiles = [load_profile(path) for path in sorted(FOLDER.glob("*.yaml"))]
    assert len(profiles) > 9
    for name in SHARED:
        assert len({getattr(p, name) for p in profiles}) == 1, name


def test_reports_give_the_range_of_the_errors(published):
    given = yaml.safe_load(published.RUNS.read_text())
    rows = [row for row in given["runs"] if row.get("precision", "bf16") == "bf16"]
    assert sum(row.get("fit", False) for row in rows) <= 4
    errors = [found.error for found in published.compare(rows, given["software"], {})]
    assert LOWEST_ERROR - 0.005 < min(errors) < LOWEST_ERROR + 0.02
    assert HIGHEST_ERROR - 0.02 < max(errors) < HIGHEST_ERROR + 0.005
    low, high = likely(0.2)
    assert low < 0.2 < high


def test_a_step_is_put_together_from_its_operators(published):
    measured, estimated = published.measured_and_estimated()
    assert estimated == pytest.approx(measured, rel=0.1)


def test_a_missed_goal_ends_with_1(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["published.py", "--only", "tpu7x-256"])
    assert published.main() == 0
    assert "every goal is met" in capsys.readouterr().out.splitlines()[-1]
    (row,) = [r for r in yaml.safe_load(published.RUNS.read_text())["runs"] if r["id"] == "tpu7x-256"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"runs": [row | {"tflops": 2 * row["tflops"]}]}))
    monkeypatch.setattr(sys, "argv", ["published.py", "--runs", str(tmp_path / "other.yaml")])
    assert published.main() == 1
    assert "missed: tpu7x-256 -4" in capsys.readouterr().out.splitlines()[-1]


def test_what_an_estimate_depends_on():
    plan = read_run(ROOT / "research/deepseek3/deepseek3_671b/pretrain_deepseek3_671b.yaml")
    found = dict(sensitivities(plan, load_profile()))
    assert set(found) == set(VARIED.values())
    assert 0 < found["efficiency of products"] < 0.1 and found["start of an operator"] < 0
