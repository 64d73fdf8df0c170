"""A HuggingFace folder loaded by ranks that MindSpore's compiler has split: each reads its own parts and no more."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import convert_weight
import numpy as np
import pytest
import torch
from cpu_parallel.small_deepseek import MOE, SIZES
from helpers.hf_folders import random_tensors, write_folder
from helpers.small_models import v3_config
from hf_config import config_to_hf

from mindformers_ext.rank_compiler.stand_in_cann import COMPILE, ascend_environment
from mindformers_ext.sharded_checkpoint.layout import StoredPiece, covers
from mindformers_ext.sharded_checkpoint.reader import open_source

TESTS = Path(__file__).parents[1]
RANKS = 4
LAYOUT = {"parallel": {"data_parallel": 2, "model_parallel": 2, "expert_parallel": 2}, "shard_size": -1}


def load_on_rank(rank: int, folder: Path, out: Path) -> dict:
    """Compile and load as one rank; returns what it wrote."""
    out.mkdir()
    environment = ascend_environment(rank, RANKS, COMPILE) | {"GLOG_v": "3", "OMP_NUM_THREADS": "1"}
    folders = [str(TESTS.parent), str(TESTS), str(TESTS.parent / "research/deepseek3"), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    script = str(TESTS / "helpers/compiled_huggingface_load.py")
    command = [sys.executable, script, json.dumps(LAYOUT), str(folder), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "loaded.json").read_text())


@pytest.mark.slow
def test_every_rank_reads_only_its_parts(tmp_path):
    config = config_to_hf(v3_config(MOE, **SIZES), 0, "float32")
    folder = write_folder(tmp_path / "hf", config, random_tensors(config, torch.float32))
    convert_weight.convert(["--input", str(folder), "--output", str(tmp_path / "whole"), "--dtype", "fp32"])
    source = open_source(tmp_path / "whole")
    whole = {name: source.read(name)[:] for name in source.names()}
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(lambda rank: load_on_rank(rank, folder, tmp_path / str(rank)), range(RANKS)))

    for rank, found in enumerate(loaded):
        assert found["places"].keys() == whole.keys()
        with np.load(tmp_path / str(rank) / "loaded.npz") as parts:
            for name, ranges in found["places"].items():
                part = whole[name][tuple(slice(*bounds) for bounds in ranges)]
                assert np.array_equal(parts[name], part), (rank, name)
            assert found["read_bytes"] == sum(parts[name].nbytes for name in parts.files)
        assert found["read_bytes"] < sum(value.nbytes for value in whole.values()) / 2
    for name, value in whole.items():
        pieces = {tuple(map(tuple, found["places"][name])) for found in loaded}
        assert covers([StoredPiece(0, ranges, ()) for ranges in pieces], value.shape), name
    experts = loaded[3]["places"]["model.layers.1.mlp.experts.gate_up_proj"]
    assert prod(end - begin for begin, end in experts) == whole["model.layers.1.mlp.experts.gate_up_proj"].size // 4
