"""Values whose length the device tells: what they become on CPU."""

import pytest
from helpers.mindir_model import Model

from mindformers_ext.layers.exact_experts import AT_MOST
from mindformers_ext.lowering.graph import Graph, set_attribute
from mindformers_ext.lowering.lower import lower


def chosen_rows() -> Model:
    """Of 8 places at most 3 in 4 are chosen; rows (., 5) are taken with them, written flat, and added up."""
    model = Model()
    model.apply("ReLU", ["marks_in"], "marks", (8,))
    model.apply("ReLU", ["x_in"], "x", (8, 5))
    model.apply("NonZero", ["marks"], "places", (-1, 1))
    set_attribute(model.proto.primitives[-1], AT_MOST, (3, 4))
    model.apply("Reshape", ["places", model.constant("flat", (-1,))], "index", (-1,))
    axis, alpha = model.constant("axis", 0), model.constant("alpha", 1)
    model.apply("IndexSelect", ["x", axis, "index"], "rows", (-1, 5))
    model.apply("Reshape", ["rows", model.constant("flat_too", (-1,))], "elements", (-1,))
    model.apply("Reshape", ["elements", model.constant("by_five", (-1, 5))], "again", (-1, 5))
    model.apply("IndexAddExt", ["x", axis, "index", "again", alpha], "out", (8, 5))
    return model


def test_every_buffer_is_as_long_as_it_can_be():
    model = chosen_rows()
    lower(model.proto, 0, 1)
    graph = Graph(model.proto, 0, 1)
    assert [graph.dims(name) for name in ("places", "index", "rows", "elements", "again", "out")] == [
        [6, 1], [6], [6, 5], [30], [6, 5], [8, 5],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("output", "kernel", "inputs"),
    [
        ("places", "NonZeroPlaces", ["marks"]),
        ("rows", "TakeRows", ["x", "index"]),
        ("out", "AddRows", ["x", "index", "again"]),
    ],
)
def test_operators_become_kernels(output, kernel, inputs):
    assert chosen_rows().lowered(output)[:2] == (kernel, inputs)


def test_a_length_that_nothing_bounds_is_refused():
    model = Model()
    model.apply("ReLU", ["marks_in"], "marks", (8,))
    model.apply("Unique", ["marks"], "out", (-1,))
    with pytest.raises(ValueError, match="'out' has no static shape, and nothing says how large it can be"):
        lower(model.proto, 0, 1)
