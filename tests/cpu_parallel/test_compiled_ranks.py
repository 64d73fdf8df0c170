"""When compiled ranks are used again, and when they are refused or compiled anew."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mindformers_ext.collectives import collectives
from mindformers_ext.config.run import read_run
from mindformers_ext.cpu_kernels import library
from mindformers_ext.cpu_parallel import compiled_ranks
from mindformers_ext.cpu_parallel.compiled_ranks import graph_key, is_sound, only_mine, private_folder, seal
from mindformers_ext.errors import UserError

YAML = Path(__file__).parents[2] / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny_4p.yaml"
DATA = "train_dataset.data_loader"
COSINE = ("lr_schedule", {"type": "CosineWithWarmUpLR", "learning_rate": 1e-3, "warmup_steps": 5, "total_steps": -1})
SHORTER = (f"{DATA}.sizes", [400, 0, 0])


def key(*overrides: tuple) -> str:
    return graph_key(read_run(YAML, 4, list(overrides)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{DATA}.config.data_path", ["0.3", "a", "0.7", "b"]),
        (f"{DATA}.config.split", "90, 10, 0"),
        (f"{DATA}.config.random_seed", 7),
        SHORTER,
        ("runner_config.epochs", 3),
        ("output_dir", "elsewhere"),
        ("run_mode", "compile"),
    ],
)
def test_other_samples_need_no_other_graph(name, value):
    assert key((name, value)) == key()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{DATA}.config.seq_length", 128),
        (f"{DATA}.config.create_attention_mask", True),
        ("parallel_config.expert_parallel", 1),
        ("optimizer.weight_decay", 0.2),
        ("runner_config.batch_size", 4),
        ("lr_schedule.decay_steps", 60),
    ],
)
def test_what_changes_the_graph_changes_the_key(name, value):
    assert key((name, value)) != key()


def test_the_model_in_another_folder_is_another_graph(tmp_path):
    plan = read_run(YAML, 4)
    (tmp_path / "deepseek3_model.py").write_text("first")
    first = graph_key(plan, tmp_path)
    (tmp_path / "deepseek3_model.py").write_text("second")
    assert len({first, graph_key(plan, tmp_path), graph_key(plan)}) == 3


def test_a_rate_that_ends_with_the_samples_depends_on_their_number():
    assert key(COSINE, SHORTER) != key(COSINE)
    assert key(COSINE, ("lr_schedule.total_steps", 150), SHORTER) == key(COSINE, ("lr_schedule.total_steps", 150))
    by_ratio = ("lr_schedule", {"type": "ConstantWarmUpLR", "learning_rate": 1e-3, "warmup_ratio": 0.1})
    assert key(by_ratio, SHORTER) != key(by_ratio)


def test_another_kind_of_cpu_has_graphs_of_its_own(monkeypatch):
    monkeypatch.setattr(library, "library_path", library.library_path.__wrapped__)  # not cached
    keys = set()
    for kind in (True, False):
        monkeypatch.setattr(library, "has_avx512", lambda kind=kind: kind)
        keys.add(key())
    assert len(keys) == 2


def test_other_libraries_have_graphs_of_their_own(monkeypatch, tmp_path):
    before = key()
    for module in (library, collectives):
        rebuilt = tmp_path / module.library_path().name
        rebuilt.write_bytes(module.library_path().read_bytes())
        monkeypatch.setattr(module, "library_path", lambda path=rebuilt: path)
        moved = key()  # another clone
        rebuilt.write_bytes(rebuilt.read_bytes() + b"\0")
        assert len({before, moved, key()}) == 3
        before = key()


def test_mindspores_own_kernels_are_known_by_their_content(monkeypatch, tmp_path):
    names = {path.name.partition(".")[0] for path in compiled_ranks.libraries()}
    assert {"libmindspore_ops_cpu", "libnnacl", "libdnnl"} <= names
    other = tmp_path / "libmindspore_ops_cpu.so"
    other.write_bytes(b"one")
    monkeypatch.setattr(compiled_ranks, "libraries", lambda: [other])
    before = key()
    other.write_bytes(b"two")
    assert key() != before


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two compiled ranks."""
    made = private_folder(tmp_path, "key")
    with only_mine():
        for path in compiled_ranks.rank_files(made, 2).values():
            path.parent.mkdir(exist_ok=True)
            path.write_text(path.name)
        seal(made, 2)
    return made


def test_compiled_ranks_are_used_again(folder, tmp_path):
    assert private_folder(tmp_path, "key") == folder
    assert is_sound(folder, 2)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("change", [damage, empty, Path.unlink])
@pytest.mark.parametrize("file", ["rank_1/cpu.mindir", "rank_0/compiled.json", "checksums.json"])
def test_a_changed_file_is_compiled_again(folder, file, change: Callable[[Path], None]):
    change(folder / file)
    assert not is_sound(folder, 2)


def test_a_rank_more_is_compiled(folder):
    assert not is_sound(folder, 3)


@pytest.mark.parametrize("place", ["..", ".", "rank_1", "rank_0/cpu.mindir"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_refused(folder, tmp_path, place, mode):
    path = (folder / place).resolve()
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(UserError, match=f"^{path} can be written by other users, .*: remove {folder.parent}"):
        private_folder(tmp_path, "key")


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_what_belongs_to_others_is_refused(folder, tmp_path):
    os.chown(folder, 65534, -1)
    with pytest.raises(UserError, match="can be written by other users"):
        private_folder(tmp_path, "key")


def test_a_link_to_a_folder_of_others_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / compiled_ranks.FOLDER).symlink_to(tmp_path / "open")
    with pytest.raises(UserError, match="can be written by other users"):
        private_folder(tmp_path, "key")


def test_whatever_the_umask_ranks_are_private(tmp_path):
    before = os.umask(0)
    try:
        made = private_folder(tmp_path, "key")
        with only_mine():
            (made / "rank_0").mkdir()
        assert private_folder(tmp_path, "key") == made
        assert os.umask(0) == 0
    finally:
        os.umask(before)
