"""A state that is not healthy gets another name, and the newest, every K-th and the latest stay."""

import json

import numpy as np
import pytest

from mindformers_ext.sharded_checkpoint.gate import Gate
from mindformers_ext.sharded_checkpoint.layout import Meta, Piece, Slot
from mindformers_ext.sharded_checkpoint.reader import open_source
from mindformers_ext.sharded_checkpoint.writer import Saver


def pieces(rank: int, scale: float = 1.0, bias: float = 0.0, value: float = 0.0) -> dict[str, Piece]:
    """Two ranks: each half of an embedding and of its moment, and the bias, which both hold."""
    half = ((2 * rank, 2 * rank + 2), (0, 3))
    moment = np.full((2, 3), value if rank else 0.0, np.float32)
    return {
        "model.embed.weight": Piece(np.full((2, 3), scale, np.float32), Slot((4, 3), half)),
        "adam_m.model.embed.weight": Piece(moment, Slot((4, 3), half)),
        "router.expert_bias": Piece(np.array([bias, -bias], np.float32), Slot.whole((2,), copy=rank)),
    }


def save(savers: list[Saver], step: int, **state) -> None:
    for rank in (1, 0):
        savers[rank].save(Meta(step, 2), pieces(rank, **state))


@pytest.fixture
def savers(tmp_path) -> list[Saver]:
    gate = Gate(embedding_norm_factor=2.0, max_expert_bias=0.5)
    return [Saver(tmp_path, rank, 2, keep=2, keep_every=4, gate=gate) for rank in range(2)]


BAD = [
    ({"value": np.nan}, "adam_m.model.embed.weight is not finite"),
    ({"value": np.inf}, "adam_m.model.embed.weight is not finite"),
    ({"bias": 0.6}, "router.expert_bias is 0.6 off its mean"),
    ({"scale": 2.1}, "the embedding's norm is 7.275, usual is 3.464"),
    ({"scale": 0.4}, "the embedding's norm"),
]


@pytest.mark.parametrize(("state", "words"), BAD, ids=lambda value: str(value))
def test_what_is_not_healthy(savers, tmp_path, caplog, state, words) -> None:
    save(savers, 1, bias=0.5)
    save(savers, 2, **state)
    assert (tmp_path / "latest").read_text() == "step_000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001", "unhealthy_step_000002"]
    assert words in caplog.text
    assert open_source(tmp_path).meta.step == 1
    assert open_source(tmp_path / "unhealthy_step_000002").meta.step == 2  # whole, for whoever asks for it
    save(savers, 3, scale=1.5)
    assert (tmp_path / "latest").read_text() == "step_000003"


def test_what_is_usual_moves_and_is_saved(savers, tmp_path) -> None:
    for step, scale in enumerate((1.0, 1.8, 2.5), 1):
        save(savers, step, scale=scale)
    assert (tmp_path / "latest").read_text() == "step_000003"  # 2.5 is more than twice the first, not twice the mean
    meta = json.loads((tmp_path / "step_000003/meta.json").read_text())
    norms = open_source(tmp_path).meta.health["embedding_norms"]
    assert norms == pytest.approx([12**0.5 * scale for scale in (1.0, 1.8, 2.5)]) and meta


def test_what_is_kept(savers, tmp_path) -> None:
    for step in range(1, 11):
        save(savers, step, value=np.nan if step in (5, 6, 7) else 0.0)
    kept = {path.name for path in tmp_path.glob("*step_*")}
    assert kept == {f"step_{n:06d}" for n in (4, 8, 9, 10)} | {f"unhealthy_step_{n:06d}" for n in (6, 7)}


def test_a_run_that_never_was_healthy_has_no_latest(savers, tmp_path) -> None:
    save(savers, 1, value=np.nan)
    assert not (tmp_path / "latest").exists()
