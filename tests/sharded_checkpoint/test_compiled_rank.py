"""What a split network holds, as its Python parameters tell it, is what MindSpore's compiler stored on the rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ext.rank_compiler.stand_in_cann import COMPILE, ascend_environment
from mindformers_ext.sharded_checkpoint.layout import compiled_slots

TESTS = Path(__file__).parents[1]
RANKS = [
    pytest.param(1, 4, {"dp": 2, "mp": 2, "shard_optimizer": True}, id="dp2-mp2-optimizer", marks=pytest.mark.slow),
    pytest.param(3, 4, {"pp": 2, "mp": 2, "micro": 2}, id="pp2-mp2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("rank,ranks,degrees", RANKS)
def test_slots_of_a_compiled_network(tmp_path, rank: int, ranks: int, degrees: dict) -> None:
    environment = ascend_environment(rank, ranks, COMPILE) | {"GLOG_v": "3", "OMP_NUM_THREADS": "1"}
    folders = [str(TESTS.parent), str(TESTS), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    command = [sys.executable, str(TESTS / "helpers/compiled_rank_state.py"), json.dumps(degrees), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    held = json.loads((tmp_path / "held.json").read_text())
    compiled = compiled_slots(json.loads((tmp_path / "compiled.json").read_text()))
    expected = {name: [slot.full_shape, slot.ranges, slot.copy] for name, slot in compiled.items()}
    assert held["slots"] == json.loads(json.dumps(expected))
    assert held["loaded"]
    assert any(slot.shape != slot.full_shape for slot in compiled.values())
