"""inspect_checkpoint.py and reshard_checkpoint.py as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.layouts import LAYOUTS, Degrees, compiled, save, values
from safetensors.numpy import save_file

from mindformers_ext.sharded_checkpoint.audit import Difference, differences, rows, verify_all
from mindformers_ext.sharded_checkpoint.reader import open_source

ROOT = Path(__file__).parents[2]
DP2_MP2, PIPELINE = Degrees(dp=2, mp=2, shard=2), LAYOUTS[8]


def call(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """`first` in one layout; `second` of a later step in another, with one value changed and one parameter more."""
    root = tmp_path_factory.mktemp("saved")
    sizes = {"vocab_size": 16}
    save(root / "first", DP2_MP2, prefix="run", model=sizes, versions={"mindspore": "2.9.0"}, consumed_samples=28)
    changed = values()
    changed["layers.1.o_proj.weight"][2, 3] += 0.5
    save(root / "second", PIPELINE, step=9, parameters=changed)
    return root


def test_inspect_describes_and_verifies(saved) -> None:
    result = call("inspect_checkpoint.py", saved / "first", "--parameters")
    assert result.returncode == 0, result.stderr
    for words in (
        "step_000007",
        "step 7, epoch 0, 28 samples of it read",
        "saved by 4 rank(s); run run; mindspore 2.9.0",
        "model: vocab_size 16",
        "weights: 14 parameters, 7,712 bytes ({'float32': 14})",
        "training state: 29 parameters",
        "every byte as it was written",
    ):
        assert words in result.stdout, words
    (line,) = (line for line in result.stdout.splitlines() if line.split()[:1] == ["layers.0.q_proj.weight"])
    assert "float32   [16, 8]" in line and "512 bytes, 4 part(s), split [4, 1]" in line


def test_inspect_compares(saved) -> None:
    result = call("inspect_checkpoint.py", saved / "first", saved / "second")
    assert result.returncode == 1
    assert "layers.1.o_proj.weight: values, largest difference 5.000e-01" in result.stdout
    assert "1 parameters differ, 42 are the same bit for bit" in result.stdout
    assert call("inspect_checkpoint.py", saved / "first", saved / "first").returncode == 0


def test_differences_of_names_shapes_and_types() -> None:
    class Memory:
        def __init__(self, **arrays):
            self.arrays = arrays

        def names(self):
            return self.arrays

        def read(self, name):
            return self.arrays[name]

    one, nan = np.ones((2, 3), np.float32), np.array([1, np.nan], np.float32)
    first = Memory(a=one, b=one, c=one, d=one, e=nan, s=np.array(2.0))
    second = Memory(a=one.copy(), b=one[:1], c=one.astype(np.float16), e=nan.copy(), f=one, s=np.array(2.5))
    assert list(differences(first, second)) == [
        Difference("b", "shape (2, 3) and (1, 3)"),
        Difference("c", "type float32 and float16", 0.0),
        Difference("d", "only in the first"),
        Difference("f", "only in the second"),
        Difference("s", "values", 0.5),
    ]


def test_inspect_refuses(saved, tmp_path) -> None:
    result = call("inspect_checkpoint.py", saved)
    assert result.returncode == 2 and "holds no checkpoint" in result.stderr and "did you mean" not in result.stderr
    save(tmp_path / "checkpoint", Degrees())
    result = call("inspect_checkpoint.py", tmp_path)
    assert result.returncode == 2 and f"did you mean '{tmp_path / 'checkpoint'}'?" in result.stderr
    save(tmp_path, Degrees())
    path = tmp_path / "step_000007/rank_0000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    result = call("inspect_checkpoint.py", tmp_path)
    assert result.returncode == 1
    assert "error: " in result.stderr and "damaged: 'adam_v.layers.3.experts.down_proj' in rank_0000" in result.stderr


def test_huggingface_folders_are_not_compared_by_our_names(saved, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"model.embed_tokens.weight": np.ones((2, 2), np.float32)}, tmp_path / "model.safetensors")
    result = call("inspect_checkpoint.py", saved / "first", tmp_path)
    assert result.returncode == 2 and "compare them with scripts/compare_hf.py" in result.stderr
    assert call("inspect_checkpoint.py", tmp_path, tmp_path).returncode == 0


def test_reshard_does_not_write_over_what_it_reads(saved) -> None:
    result = call("reshard_checkpoint.py", saved / "first", saved / "first")
    assert result.returncode == 2 and "holds the checkpoint that is read; give another folder" in result.stderr


def same_values(root: Path) -> bool:
    source = open_source(root)
    verify_all(source)
    return all(np.array_equal(source.read(name)[...], value) for name, value in values().items())


def test_reshard_to_one_file_and_like_another(saved, tmp_path) -> None:
    result = call("reshard_checkpoint.py", saved / "first", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    assert "step 7, 43 parameters on 1 rank(s)" in result.stdout
    one = open_source(tmp_path / "one")
    assert same_values(tmp_path / "one") and {row.parts for row in rows(one)} == {1}
    original = open_source(saved / "first")
    assert (one.meta.consumed_samples, one.meta.prefix) == (28, "run") and one.private(0) == original.private(0)
    result = call("reshard_checkpoint.py", tmp_path / "one", tmp_path / "like", "--like", saved / "first")
    assert result.returncode == 0, result.stderr
    assert same_values(tmp_path / "like")
    again = open_source(tmp_path / "like").layout
    assert again.entries.keys() == original.layout.entries.keys() and again.files.keys() == original.layout.files.keys()
    assert rows(open_source(tmp_path / "like")) == rows(original)


def test_reshard_to_compiled_ranks(saved, tmp_path) -> None:
    for rank in range(PIPELINE.ranks):
        path = tmp_path / f"compiled/rank_{rank}/compiled.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(compiled(PIPELINE, rank)))
    result = call("reshard_checkpoint.py", saved / "first", tmp_path / "out", "--like", tmp_path / "compiled")
    assert result.returncode == 0, result.stderr
    assert same_values(tmp_path / "out") and open_source(tmp_path / "out").meta.ranks == PIPELINE.ranks
    assert rows(open_source(tmp_path / "out")) == rows(open_source(saved / "second"))
    path.unlink()
    result = call("reshard_checkpoint.py", saved / "first", tmp_path / "no", "--like", tmp_path / "compiled")
    assert result.returncode == 2 and "has 3 compiled ranks of 4; compile all" in result.stderr
