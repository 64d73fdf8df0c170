"""run_mode compile: what the YAML trains is compiled and kept, nothing is trained, and a later run starts from it."""

import glob
import os
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import pytest
from helpers.command_line import ROOT, run_command
from helpers.small_yaml import small_sizes
from mindspore import nn

from mindformers_ext.cluster import launcher
from mindformers_ext.config.run import read_run
from mindformers_ext.config.strategy_rules import check_run
from mindformers_ext.cpu_parallel import compiled_ranks, job, launch
from mindformers_ext.training import run_modes

TINY = "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny"


def test_ranks_on_cpu_are_compiled_and_then_found(tmp_path, monkeypatch):
    def compile_ranks(builder, world_size, folder, stages=1):
        done.append("compiled")
        for path in compiled_ranks.rank_files(folder, world_size).values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("a graph")

    done, said = [], []
    monkeypatch.setattr(launch, "compile_ranks", compile_ranks)
    monkeypatch.setattr(job, "train", lambda *_: done.append("trained"))
    command = ["--config", str(ROOT / f"{TINY}_4p.yaml"), "--output_dir", str(tmp_path)]
    job.run([*command, "--run_mode", "compile"], 4, tmp_path, said.append)
    assert done == ["compiled"] and said[-1].startswith("4 ranks are compiled")
    job.run([*command, "--run_mode", "train"], 4, tmp_path, said.append)
    assert done == ["compiled", "trained"]


def test_on_cards_the_cache_is_named_by_what_decides_the_graph(tmp_path, monkeypatch, capsys):
    """Eight cards that are not there, and an msrun that is never started."""
    monkeypatch.setattr(glob, "glob", lambda pattern: [f"/dev/davinci{i}" for i in range(8)])
    monkeypatch.setattr(launcher, "program", lambda name: name)
    monkeypatch.setattr(os, "execvp", lambda *_: None)

    clean = dict(os.environ)

    def cache(*more: str) -> str | None:
        monkeypatch.setattr(os, "environ", dict(clean))  # of this call: a later test must not find its cache
        command = f"run_mindformer.py --config {ROOT}/{TINY}_8p.yaml --output_dir {tmp_path} {' '.join(more)}"
        launcher.main([command, "8", "8", "", "18999"])
        return os.environ.get("MS_COMPILER_CACHE_PATH")

    assert cache() is None
    kept = cache("--run_mode", "compile")
    assert Path(kept).parent == tmp_path / "compile_cache"
    Path(kept).mkdir(parents=True)
    assert cache() == kept
    assert cache("--optimizer.weight_decay", "0.2") is None


def test_a_run_of_one_process_has_nothing_to_compile_before():
    run = read_run(ROOT / f"{TINY}.yaml", overrides=[("run_mode", "compile")])
    assert [(v.key, v.sentence[:30]) for v in check_run(run)] == [("run_mode", "only a graph that is split ove")]


@pytest.mark.parametrize("sinks", [True, False])
def test_a_process_ends_where_training_would_begin(sinks, capsys):
    class Counting(nn.Cell):
        def compile(self, *inputs):
            done.append(("compile", [x.shape for x in inputs]))

    done = []
    dataset = ms.dataset.NumpySlicesDataset([[1.0, 2.0]] * 4).batch(2)
    model = SimpleNamespace(
        train_network=Counting(), build=lambda data, sink_size, epoch: done.append(("build", sink_size, epoch))
    )
    run_modes.compile_only(model, 3, dataset, [], dataset_sink_mode=sinks, sink_size=1)
    assert done == [("build", 1, 3) if sinks else ("compile", [(2, 2)])]
    assert "compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_are_really_compiled_once(tmp_path):
    """Without data: a compiler reads shapes. The second time nothing is compiled."""
    sizes = small_sizes(32) | {"parallel_config.model_parallel": 1}
    command = f"run_mindformer.py --config {ROOT}/{TINY}_4p.yaml --output_dir {tmp_path} --run_mode compile "
    command += " ".join(f"--{key} {value}" for key, value in sizes.items())
    for words in ("compiling the graphs of 2 ranks", "the graphs of all 2 ranks are in"):
        launch = ["bash", str(ROOT / "scripts/msrun_launcher.sh"), command, "2", "", "", "", "", str(tmp_path / "log")]
        done = run_command(launch, tmp_path)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert words in done.stdout and "2 ranks are compiled" in done.stdout
    assert not (tmp_path / "metrics.jsonl").exists()
