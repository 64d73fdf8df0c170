"""The tiny YAML, cut smaller, as ranks of many layouts: each trains like one process, through the Trainer."""

import os
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from helpers.small_yaml import small_sizes

from mindformers_ext.cpu_parallel import verify
from mindformers_ext.cpu_parallel.command import read_plan
from mindformers_ext.cpu_parallel.run_problem import LAYOUTS, RunProblem
from mindformers_ext.errors import ConfigError

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "research/deepseek3/deepseek3_tiny"
SMALL = small_sizes(32) | {
    "model.model_config.intermediate_size": 128,
    "train_dataset.data_loader.config.data_path": "[1, absent]",
}
SIZES = [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def problem(tmp_path_factory) -> RunProblem:
    command = ["--config", str(FOLDER / "pretrain_deepseek3_tiny.yaml"), *SIZES]
    return RunProblem.of(command, tmp_path_factory.mktemp("yaml"), steps=5)


def check(problem: RunProblem, name: str) -> None:
    """The layout passes, and every step has another loss (on a few random samples not always a smaller one)."""
    layout = problem.layouts()[name]
    (row,) = verify.verify(problem, [layout], problem.folder)
    assert row.passed, verify.table([row])
    losses = row.comparison.losses
    assert len(set(losses)) == len(losses) == problem.steps
    assert row.collectives > 0


def test_experts_over_two_ranks_equal_one_process(problem, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    check(problem, "ep2")
    assert list(tmp_path.glob("parallel_speed_up_*")) == []  # of one process, the compiler and two ranks


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(LAYOUTS) - {"ep2"}))
def test_layout_equals_one_process(problem, name):
    check(problem, name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depth"), [("mp2", 2), ("pp2", 2), ("pp2", 3)])
def test_depths_of_multi_token_prediction_equal_one_process(tmp_path, name, depth):
    """A pipeline's last stage shifts labels twice from depth 2 on, its first, which embeds them, from depth 3 on."""
    depths = ["--model.model_config.mtp_depth", str(depth)]
    command = ["--config", str(FOLDER / "pretrain_deepseek3_tiny.yaml"), *SIZES, *depths]
    check(RunProblem.of(command, tmp_path, steps=3), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dp2-optimizer", "mp2-vocab"])
def test_tied_embeddings_equal_one_process(tmp_path, name):
    tied = ["--model.model_config.tie_word_embeddings", "True"]
    command = ["--config", str(FOLDER / "pretrain_deepseek3_tiny.yaml"), *SIZES, *tied]
    check(RunProblem.of(command, tmp_path, steps=3), name)


def test_layout_that_does_not_fit_is_a_sentence(problem):
    layout = problem.layouts()["mp4"]
    layout.arguments["overrides"]["parallel_config"]["model_parallel"] = 8
    with pytest.raises(ConfigError, match="model_parallel must divide num_heads, .* 8 does not divide 4"):
        problem.jobs(replace(layout, world_size=8), problem.folder / "mp8")


def test_capacity_that_would_drop_by_layout_is_a_sentence(tmp_path):
    """A sequence is the group, and lies on two devices; the layouts that check capacity take a group that fits."""
    dropping = ["--moe_config.use_gmm", "False", "--moe_config.capacity_factor", "0.75"]
    command = ["--config", str(FOLDER / "pretrain_deepseek3_tiny.yaml"), *SIZES, *dropping]
    given = RunProblem.of(command, tmp_path, steps=1)
    with pytest.raises(ConfigError, match="expert_group_size must divide .* a sequence of 32, does not divide 16"):
        given.jobs(given.layouts()["dp2-mp2-pp2-ep2"], tmp_path / "layout")
    for name in ("ep4-mp2-a2a", "ep2-drops"):
        assert given.layouts()[name].arguments["model"]["moe_config.expert_group_size"] <= 32


def test_a_pipeline_gets_a_layer_for_every_stage(problem):
    layouts = problem.layouts()
    assert layouts["pp4"].arguments["model"] == {"model.model_config.num_layers": 4}
    assert layouts["pp2"].arguments["model"] == {}
    assert problem.single_name(layouts["pp4"]) != problem.single_name(layouts["pp2"])


def test_what_goes_to_cpu_ranks():
    run = ["--config"]
    assert read_plan([*run, str(FOLDER / "pretrain_deepseek3_tiny_8p.yaml")]).is_semi_auto
    assert not read_plan([*run, str(FOLDER / "pretrain_deepseek3_tiny.yaml"), "--use_parallel", "True"]).is_semi_auto
    for unreadable in ([*run, "nowhere.yaml"], [], [*run, str(FOLDER / "pretrain_deepseek3_tiny.yaml"), "--seed", "x"]):
        with pytest.raises(ConfigError):
            read_plan(unreadable)


@pytest.mark.slow
def test_killed_worker_ends_the_job_and_is_named(problem, tmp_path):
    command = ["run_mindformer.py", *problem.command, "--config", str(FOLDER / "pretrain_deepseek3_tiny_4p.yaml")]
    command += ["--output_dir", str(tmp_path), "--parallel_config.model_parallel", "1", "--processor", "null"]
    command += ["--parallel_config.use_seq_parallel", "False", "--train_dataset.data_loader.sizes", "[40000, 0, 0]"]
    place = ["2", "2", "127.0.0.1", "8118", "0", str(tmp_path / "log")]
    launcher = ["bash", str(ROOT / "scripts/msrun_launcher.sh"), shlex.join(command), *place]
    shared_memory = set(os.listdir("/dev/shm"))
    log = tmp_path / "log" / "scheduler.log"
    with subprocess.Popen(launcher, stdout=subprocess.DEVNULL, cwd=tmp_path) as job:
        while job.poll() is None and (not log.exists() or "step 10, " not in log.read_text()):
            time.sleep(0.2)
        assert job.poll() is None, log.read_text()
        workers = {p.environ().get("CPU_PARALLEL_RANK"): p for p in psutil.Process(job.pid).children()}
        workers["1"].kill()
        assert job.wait(timeout=4) != 0  # the launcher itself ends too
    assert "error: rank 1 failed first: killed by SIGKILL" in log.read_text()
    assert not workers[
        "0"
    ].is_running()  # it may have been inside a step: test_launch.py reads what one says that waits
    assert set(os.listdir("/dev/shm")) <= shared_memory


def test_launcher_refuses_a_wrong_count(tmp_path):
    command = f"run_mindformer.py --config {FOLDER / 'pretrain_deepseek3_tiny_8p.yaml'} --output_dir {tmp_path}"
    launcher = ["bash", str(ROOT / "scripts/msrun_launcher.sh"), command, "4", "4", "127.0.0.1", "8118", "0"]
    done = subprocess.run([*launcher, str(tmp_path / "log")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "2 x 1 x 2 x 2 = 8 and there are 4" in done.stderr  # before a process or a log is started
