"""The stand-in CANN libraries and the rank compiler, on a toy whose collectives are computed by hand."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mindformers_ext.rank_compiler import stand_in_cann
from mindformers_ext.rank_compiler.compile_rank import describe_failure
from mindformers_ext.rank_compiler.stand_in_cann import COMPILE, MEMORY, StandInError, ascend_environment

TESTS = Path(__file__).parent
BATCH, HIDDEN, FFN, LAYERS, FLOAT = 16, 64, 256, 4, 4


def compile_toy(out: Path, rank: int, world_size: int, level: int = COMPILE, function: str = "build", **arguments):
    """Run the child entry; returns (exit code, log)."""
    env = ascend_environment(rank, world_size, level)
    env["PYTHONPATH"] = f"{TESTS.parents[1]}:{TESTS}:{env['PYTHONPATH']}"
    command = [sys.executable, "-m", "mindformers_ext.rank_compiler.compile_rank", "--builder", f"toy_cells:{function}"]
    command += ["--arguments", json.dumps(arguments), "--out", str(out)]
    done = subprocess.run(command, env=env, cwd=out, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def collective_table(compiled: dict) -> dict:
    """{(kind, ranks, bytes): count}."""
    table = {}
    for record in compiled["collectives"]:
        key = (record["kind"], tuple(record["ranks"]), record["bytes"])
        table[key] = table.get(key, 0) + record["count"]
    return table


def test_tensor_and_optimizer_parallel_collectives_match_hand_computation(tmp_path):
    """dp 2 x mp 2, rank 1 = (dp 0, mp 1): its mp group is {0, 1}, its dp group {1, 3}."""
    code, log = compile_toy(tmp_path, 1, 4, dp=2, mp=2, pp=1, shard_optimizer=True)
    assert code == 0, log
    compiled = json.loads((tmp_path / "compiled.json").read_text())
    activation = BATCH // 2 * HIDDEN * FLOAT
    weight = HIDDEN * FFN // 2 * FLOAT
    # Forward of every block's down and backward of every block's up (lazy_inline keeps the input's gradient).
    assert collective_table(compiled) == {
        ("AllReduce", (0, 1), activation): LAYERS + LAYERS,
        ("AllGather", (1, 3), weight): 2 * LAYERS,
        ("ReduceScatter", (1, 3), weight): 2 * LAYERS,
        ("AllReduce", (1, 3), FLOAT): 1,  # the loss's mean over the batch
    }
    assert compiled["parameters"]["blocks.0.up"]["shape"] == [HIDDEN // 2, FFN // 2]
    assert compiled["layouts"]["blocks.0.up"]["tensor_map"][1] == 0
    assert compiled["strategies"]


def test_pipeline_counts_functions_by_their_calls(tmp_path):
    """pp 2 x dp 2 x mp 2, 4 micro batches, rank 0: lazy_inline keeps one function, called once a micro batch."""
    code, log = compile_toy(tmp_path, 0, 8, dp=2, mp=2, pp=2, micro=4)
    assert code == 0, log
    compiled = json.loads((tmp_path / "compiled.json").read_text())
    activation = BATCH // 4 // 2 * HIDDEN * FLOAT
    assert collective_table(compiled) == {
        ("Send", (0, 4), activation): 4,
        ("Receive", (0, 4), activation): 4,
        ("AllReduce", (0, 1), activation): 2 * LAYERS // 2 * 4,
        ("AllReduce", (0, 2), HIDDEN * FFN // 2 * FLOAT): 2 * LAYERS // 2,
    }
    held = set(compiled["weights"])
    assert held == {f"blocks.{i}.{w}" for i in range(LAYERS // 2) for w in ("up", "down")}


def test_memory_level_prints_the_plan_and_1024_ranks_cost_nothing_more(tmp_path):
    code, log = compile_toy(tmp_path, 1000, 1024, MEMORY, dp=16, mp=64, pp=1)
    assert code == 0, log
    assert "Used peak memory usage (without fragments)" in log
    assert json.loads((tmp_path / "compiled.json").read_text())["rank"] == 1000


def test_refused_strategy_is_reported_with_its_line(tmp_path):
    code, log = compile_toy(tmp_path, 0, 4, function="build_refused")
    failure = json.loads((tmp_path / "failure.json").read_text())
    assert code == 1, log
    assert not (tmp_path / "compiled.json").exists()
    assert any("toy_cells.py" in line for line in failure["source_lines"]), failure


def test_failure_names_the_models_lines_the_innermost_first():
    """Both formats of MindSpore's call stack; the functions around the lines, and the framework's own, are left out."""
    message = """operator MatMul init failed
In file /model/layers.py:72, 12~99/        y = self.matmul(x, self.weight)/
In file /model/layers.py:71~73, 4~41/    def construct(self, x):/
In file /env/site-packages/mindformers/wrapper.py:449, 15~27/        return self.network(**inputs)/
# 0 In file /model/layers.py:236"""
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        lines = describe_failure(error)["source_lines"]
    assert lines[:2] == ["/model/layers.py:72: y = self.matmul(x, self.weight)", "/model/layers.py:236"]
    assert lines[2].startswith(f"{__file__}:") and len(lines) == 3


def test_concurrent_first_use_builds_one_complete_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stand_in_cann, "generate_source", lambda *_: "long aclInit(void) { return 0; }\n")
    with ThreadPoolExecutor(4) as pool:
        homes = set(pool.map(lambda _: stand_in_cann.stand_in_home(), range(4)))
    (home,) = homes
    assert {p.stem for p in (home / "lib64").iterdir()} == {
        *stand_in_cann.LIBRARY_NAMES.split(),
        Path(stand_in_cann.WAITS).stem,
    }
    assert not list(home.parent.glob(".build-*"))


def test_missing_compiler_version_and_wheel_parts_are_clear_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(stand_in_cann, "generate_source", lambda *_: "")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        patch.delenv("CC", raising=False)
        with pytest.raises(StandInError, match="no C compiler found.*install one"):
            stand_in_cann.stand_in_home()
    with monkeypatch.context() as patch:
        patch.setattr(stand_in_cann.importlib.metadata, "version", lambda _: "2.7.1")
        with pytest.raises(StandInError, match="MindSpore 2.7.1 is not supported.*2.9.0"):
            stand_in_cann.stand_in_home()
    with pytest.raises(StandInError, match="libmindspore_ascend.so.2 is missing"):
        stand_in_cann.plugin_libraries(tmp_path)
    with pytest.raises(ValueError, match="rank 8 is not in a cluster of 8 devices: use 0 to 7"):
        ascend_environment(8, 8)
    assert not [p for p in os.listdir(tmp_path) if p.endswith(".so")]
