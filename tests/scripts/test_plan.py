"""scripts/plan.py: what it prints, writes and returns."""

import runpy
from pathlib import Path

import pytest
import yaml

from mindformers_ext.config.run import read_run
from mindformers_ext.config.strategy_rules import check_plan

ROOT = Path(__file__).parents[2]
YAML = ROOT / "research" / "deepseek3" / "deepseek3_1b" / "pretrain_deepseek3_1b.yaml"


@pytest.fixture(scope="module")
def plan():
    return runpy.run_path(str(ROOT / "scripts" / "plan.py"))["plan"]


def test_the_best_plan_is_written_and_explains_another(plan, tmp_path, capsys):
    out = tmp_path / "best.yaml"
    asked = ["--config", str(YAML), "--device_num", "8", "--global_batch", "64", "--top", "3", "--out", str(tmp_path)]
    assert plan([*asked, "--write", str(out), "--explain", str(YAML)]) == 0
    shown = capsys.readouterr().out
    assert "the best is" in shown and "alone:" in shown and (tmp_path / "frontier.png").stat().st_size > 1000
    run = read_run(out)
    assert (run.device_num, run.global_batch, check_plan(run)) == (8, 64, [])
    assert out.read_text().startswith("# Written by scripts/plan.py")
    given = yaml.safe_load(YAML.read_text())
    assert run.values["lr_schedule"] == given["lr_schedule"], "what is no part of the plan stays"


def test_what_fits_nowhere_ends_with_1(plan, tmp_path, capsys):
    asked = ["--config", str(YAML), "--device_num", "8", "--memory", "0.5", "--out", str(tmp_path)]
    assert plan([*asked, "--write", str(tmp_path / "none.yaml")]) == 1
    assert "no plan of 8 devices and" in capsys.readouterr().out
    assert not (tmp_path / "none.yaml").exists()


def test_an_unknown_device_is_named(plan, tmp_path):
    with pytest.raises(Exception, match="--device b100: name a YAML file, or one of a2, a2_313, a3"):
        plan(["--config", str(YAML), "--device_num", "8", "--device", "b100"])
