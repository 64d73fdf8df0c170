"""Where layers lie in a pipeline of several chunks, against MindFormers' LayerSetting."""

import pytest

from mindformers_ext.config.pipeline import Pipeline


def test_layers_go_through_the_stages_once_for_every_chunk():
    pipeline = Pipeline(layers=8, further=1, stages=2, chunks=2)
    assert [place.stage for place in pipeline.places] == [0, 0, 1, 1, 0, 0, 1, 1, 1]
    assert [place.chunk for place in pipeline.places] == [0] * 4 + [1] * 5
    assert pipeline.layers_of(0) == [0, 1, 4, 5]
    assert pipeline.layers_of(1, 1) == [6, 7, 8]  # MTP with the last


def test_a_folded_pipeline_ends_where_it_begins():
    pipeline = Pipeline(layers=8, further=1, stages=2, chunks=2, folded=True)
    assert [place.stage for place in pipeline.places] == [0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert pipeline.first.stage == pipeline.last.stage == 0


def test_the_remainder_goes_to_the_last_chunks():
    assert list(Pipeline(7, 0, stages=2, chunks=2).counts.values()) == [1, 2, 2, 2]
    assert list(Pipeline(7, 0, stages=2, chunks=2, folded=True).counts.values()) == [1, 2, 2, 2]


def test_recompute_of_a_stage_is_dealt_to_its_chunks():
    pipeline = Pipeline(layers=8, further=0, stages=2, chunks=2)
    assert pipeline.covered([3, 0]) == [0, 1, 4]
    assert pipeline.covered([[0, 1], [2, 0]]) == [2, 4, 5]
    assert pipeline.covered(False) == []


class Degrees:
    """What LayerSetting reads of MindFormers' parallel configuration."""

    swap, recompute, gradient_aggregation_group = None, True, 1

    def __init__(self, stages: int):
        self.pipeline_stage = stages


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "offset"),
    [
        (8, 2, 2, 0),
        (12, 2, 3, 0),
        (7, 2, 2, [[0, 1], [1, 1]]),
        (9, 4, 2, [[1, 0, 0, 0], [0, 0, 0, 0]]),
        (5, 2, 1, [1, 0]),
    ],
)
def test_stages_and_chunks_are_mindformers(monkeypatch, layers, stages, chunks, offset):
    import mindspore as ms
    from mindformers.parallel_core.training_graph.transformer import utils

    context = {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}
    monkeypatch.setattr(ms, "get_auto_parallel_context", context.get)
    monkeypatch.setattr(utils, "is_legacy_model", lambda: True)
    monkeypatch.setattr(utils.LayerSetting, "_check_swap_recompute_conflict", lambda self: None)
    degrees = Degrees(stages)
    degrees.swap = type("Swap", (), {"swap": False})
    theirs = utils.LayerSetting(layers, offset, degrees, chunks)
    ours = Pipeline(layers, 0, stages, chunks, offset=offset)
    assert [place.stage for place in ours.places] == list(theirs.pp_ids)
    assert [place.chunk for place in ours.places] == list(theirs.interleave_ids)
