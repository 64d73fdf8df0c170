"""scripts/dryrun.py without compiling: illegal and legal plans, comparison, sweep, the two report files."""

import importlib.util
import json
from pathlib import Path

import pytest

from mindformers_ext.config.run import read_run
from mindformers_ext.dryrun.device_profile import load_profile
from mindformers_ext.dryrun.report import compiled_micro_batches
from mindformers_ext.dryrun.sweep import sweep
from mindformers_ext.rank_compiler import stand_in_cann

CLUSTER = Path(__file__).parents[1] / "helpers" / "runs" / "cluster_671b.yaml"
RESEARCH = Path(__file__).parents[2] / "research" / "deepseek3"
SCRIPT = Path(__file__).parents[2] / "scripts" / "dryrun.py"


@pytest.fixture(scope="module")
def dryrun():
    spec = importlib.util.spec_from_file_location("dryrun_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_illegal_plan_ends_with_1_before_any_compile(dryrun, tmp_path, capsys):
    code = dryrun(["--config", str(CLUSTER), "--device_num", "1000", "--out", str(tmp_path)])
    assert code == 1
    assert "16 x 1 x 4 x 16 = 1024 and there are 1000" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["violations"]
    assert not list(tmp_path.glob("rank_*"))


def test_estimate_writes_a_self_contained_page(dryrun, tmp_path, capsys):
    arguments = ["--config", str(CLUSTER), "--ranks", "none", "--out", str(tmp_path)]
    code = dryrun([*arguments, "--parallel.parallel_optimizer_config.gradient_accumulation_shard", "True"])
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert code == report["exit_code"] == 0, out
    assert "tokens/s, MFU" in out and "Verdict: fits" in out
    assert sum(s["parameters"] for s in report["estimate"]["stages"]) == report["estimate"]["parameters"]
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4
    links = [part.split('"')[0] for part in page.split('href="')[1:]]
    assert all(link.startswith("#") for link in links) and "src=" not in page


@pytest.mark.parametrize(("micro_batches", "compiled"), [(480, 32), (16, 16)])
def test_a_long_step_is_compiled_in_part(micro_batches, compiled):
    """Two micro-batches a stage fill a pipeline: the others add operators to the graph, not to what is known."""
    assert (
        compiled_micro_batches(read_run(CLUSTER, 1024, [("parallel_config.micro_batch_num", micro_batches)]))
        == compiled
    )


def test_compare_prints_both_sides(dryrun, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(CLUSTER.read_text().replace("micro_batch_num: 32", "micro_batch_num: 64"))
    dryrun(["--config", str(CLUSTER), "--compare", str(other)])
    out = capsys.readouterr().out
    assert "dp16 cp1 mp4 pp16 ep8 m32" in out and "dp16 cp1 mp4 pp16 ep8 m64" in out
    assert "MFU" in out and "other.yaml" in out


def test_sweep_lists_legal_plans_by_time_within_memory(dryrun, tmp_path, capsys):
    axes = ["parallel_config.pipeline_stage=8,16,128", "parallel_config.expert_parallel=8,16,24,32"]
    dryrun(["--config", str(CLUSTER), "--device_num", "1024", "--out", str(tmp_path), "--sweep", *axes])
    shown = capsys.readouterr().out
    assert "12 combinations, 6 legal" in shown
    assert "illegal: pipeline_stage 8, expert_parallel 24: expert_parallel must divide" in shown
    rows = json.loads((tmp_path / "sweep.json").read_text())
    stages = [dict(map(tuple, row["overrides"]))["parallel_config.pipeline_stage"] for row in rows]
    assert set(stages) == {8, 16}, "128 stages have no layer each"
    for row in rows:
        chosen = dict(map(tuple, row["overrides"]))
        devices = chosen["parallel_config.data_parallel"] * 4 * chosen["parallel_config.pipeline_stage"]
        batch = chosen["parallel_config.data_parallel"] * chosen["parallel_config.micro_batch_num"]
        assert (devices, batch) == (1024, 512)
        assert chosen["parallel_config.expert_parallel"] in (8, 16, 32)
    order = [(not row["fits"], row["step_seconds"]) for row in rows]
    assert order == sorted(order)


def test_sweep_keeps_the_global_batch_without_a_pipeline_too():
    axes = {"parallel_config.pipeline_stage": [1, 16]}
    legal, _ = sweep(str(CLUSTER), 1024, [("model.model_config.offset", 0)], axes, load_profile())
    assert {c.plan.pp: c.plan.global_batch for c in legal} == {1: 512, 16: 512}


def test_bad_arguments_are_sentences(dryrun, tmp_path, capsys):
    assert dryrun(["--config", str(CLUSTER), "--ranks", "5000"]) == 1
    assert "numbers from 0 to 1023" in capsys.readouterr().err
    assert dryrun(["--config", str(CLUSTER), "--sweep", "pipeline_stage"]) == 1
    assert "write section.key=value" in capsys.readouterr().err
    assert dryrun(["--config", str(CLUSTER), "--sweep", "parallel_config.expert_paralell=8"]) == 1
    assert "did you mean parallel_config.expert_parallel?" in capsys.readouterr().err
    assert dryrun(["--config", str(CLUSTER), "--verify", "2"]) == 1
    assert "the best K of --sweep; give both" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        dryrun(["--config", str(CLUSTER), "--jobs", "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err
    assert dryrun(["--config", str(tmp_path / "none.yaml")]) == 1
    assert "cannot read this YAML file" in capsys.readouterr().err


def test_failures_of_the_tool_itself_end_with_2(dryrun, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    assert dryrun(["--config", str(CLUSTER), "--ranks", "none", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "file/out" in capsys.readouterr().err
    monkeypatch.setitem(dryrun.__globals__, "check_plan", lambda plan: 1 / 0)
    assert dryrun(["--config", str(CLUSTER), "--ranks", "none", "--out", str(tmp_path)]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_machine_that_cannot_compile_still_gets_the_estimate_and_ends_with_2(dryrun, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(stand_in_cann.importlib.metadata, "version", lambda _: "2.7.1")
    assert dryrun(["--config", str(CLUSTER), "--ranks", "0", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "tokens/s, MFU" in shown.out
    assert "MindSpore 2.7.1 is not supported by the dry run: install one of 2.9.0" in shown.err


REFUSED_BY_A_RUN = {
    "parallel.parallel_mode": "3",
    "parallel.full_batch": "True",
    "moe_config.expert_model_parallel": "2",
    "micro_batch_interleave_num": "2",
    "runner_config.gradient_accumulation_steps": "4",
    "model.model_config.n_kv_heads": "64",
    "model.model_config.theta": "-1",
}


@pytest.mark.parametrize(("key", "value"), [*REFUSED_BY_A_RUN.items(), ("parallel.parallel_mode", "0")])
def test_what_a_run_refuses_does_not_fit(dryrun, tmp_path, capsys, key, value):
    arguments = ["--config", str(CLUSTER), "--device_num", "1024", "--ranks", "none", "--out", str(tmp_path)]
    assert dryrun([*arguments, f"--{key}", value]) == 1
    printed = capsys.readouterr()
    assert key.rpartition(".")[2] in printed.out + printed.err


def test_lists_are_swept_and_swept_keys_are_shown(dryrun, tmp_path, capsys):
    lists = ",".join(str([count] * 16) for count in (0, 2))
    axes = ["--sweep", f"recompute_config.recompute={lists},True"]
    assert dryrun(["--config", str(CLUSTER), "--device_num", "1024", "--out", str(tmp_path), *axes]) == 0
    table = capsys.readouterr().out
    assert "3 combinations, 3 legal" in table and "recompute" in table and "[2, 2, 2" in table
    assert dryrun(["--config", str(CLUSTER), "--parallel_config.data_parallel", "{"]) == 1
    assert "--parallel_config.data_parallel: '{' is not valid YAML" in capsys.readouterr().err


def test_each_side_of_a_comparison_has_its_own_devices(dryrun, capsys):
    eight = str(RESEARCH / "deepseek3_1b" / "pretrain_deepseek3_1b.yaml")
    assert dryrun(["--config", str(CLUSTER), "--device_num", "1024", "--compare", eight]) == 0
    assert "1024" in capsys.readouterr().out
