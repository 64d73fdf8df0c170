"""Where the lowering takes kernels of ours for basic operators, and where it leaves them."""

import pytest
from helpers.mindir_model import Model


def value(model: Model, name: str, *shape: int) -> str:
    """A value of this shape that some operator makes."""
    return model.apply("ReLU", [f"{name}_in"], name, shape)


def test_matmul_takes_its_transposes():
    model = Model()
    turned = [model.constant("no", 0), model.constant("yes", 1)]
    model.apply("MatMul", [value(model, "a", 4, 8), value(model, "b", 6, 8), *turned], "out", (4, 6))
    kernel, inputs, attributes = model.lowered("out")
    assert (kernel, inputs) == ("MatMul", ["a", "b"])
    assert (float(attributes["transpose_a"]), float(attributes["transpose_b"])) == (0, 1)


@pytest.mark.parametrize(("sizes", "axis", "kernel"), [((3, 5), -1, "SplitColumns"), ((3, 5), 1, "SplitColumns"),
                                                       ((2, 2), 0, ""), ((2, 2, 4), -1, "")])  # fmt: skip
def test_columns_are_split_in_two(sizes, axis, kernel):
    model = Model()
    inputs = [value(model, "x", 4, 8), model.constant("sizes", sizes), model.constant("axis", axis)]
    model.apply("SplitWithSize", inputs, "out", *((4, size) for size in sizes))
    found, inputs, _ = model.lowered("out")
    assert found == kernel and (not kernel or inputs == ["x"])


@pytest.mark.parametrize(("axis", "kernel"), [(-1, "JoinColumns"), (1, "JoinColumns"), (0, "")])
def test_columns_of_two_are_joined(axis, kernel):
    model = Model()
    model.apply("MakeTuple", [value(model, "a", 4, 8), value(model, "b", 4, 8)], "both", (4, 8))
    model.apply("Concat", ["both", model.constant("axis", axis)], "out", (4, 16) if axis else (8, 8))
    found, inputs, _ = model.lowered("out")
    assert found == kernel and (not kernel or inputs == ["a", "b"])


@pytest.mark.parametrize(("mask", "kernel"), [((4, 1), "MaskedRows"), ((4, 8), ""), ((1, 8), "")])
def test_masked_rows(mask, kernel):
    model = Model()
    inputs = [value(model, "x", 4, 8), value(model, "m", *mask), model.tensor("zero", 0.0)]
    model.apply("MaskedFill", inputs, "out", (4, 8))
    assert model.lowered("out")[0] == kernel


class Loss(Model):
    """Cross entropy of logits (6, 8) as layers/vocabulary.py has it, and its gradient."""

    def __init__(self, axis: int = -1):
        super().__init__()
        self.axis = self.constant("axis", (axis,))
        self.dim = self.constant("dim", 1)
        logits, place = value(self, "z", 6, 8), value(self, "place", 6, 1)
        self.apply("GatherD", [logits, self.dim, place], "picked", (6, 1))
        self.apply("LogSoftmax", [logits, self.axis], "log_p", (6, 8))
        self.apply("GatherD", ["log_p", self.dim, place], "picked_log", (6, 1))
        self.apply("Softmax", [logits, self.axis], "p", (6, 8))
        self.apply("Mul", ["p", value(self, "g", 6, 1)], "scaled", (6, 8))
        self.apply("ScatterAddExt", ["scaled", self.dim, place, value(self, "minus", 6, 1)], "dz", (6, 8))


def test_cross_entropy_is_three_kernels():
    kernels = {name: Loss().lowered(name) for name in ("picked", "picked_log", "dz")}
    assert {name: (kernel, inputs) for name, (kernel, inputs, _) in kernels.items()} == {
        "picked": ("PickColumn", ["z", "place"]),
        "picked_log": ("PickLogSoftmax", ["z", "place"]),
        "dz": ("SplitCrossEntropyGrad", ["z", "g", "place", "minus"]),
    }


def test_what_is_no_cross_entropy_stays():
    loss = Loss(axis=0)
    assert loss.lowered("picked_log")[0] == "PickColumn" and loss.lowered("dz")[0] == ""


def norm(axes: tuple[int, ...] = (), keep: int = 0, scale: bool = False) -> Model:
    """The squares of two gradients, perhaps out of a loss scale; the second one lies on two ranks."""
    model = Model()
    constants = [model.constant("axes", axes), model.constant("keep", keep), model.constant("dtype", None)]
    factor = value(model, "factor", 1)
    for i in range(2):
        gradient = value(model, f"g{i}", 4, 8)
        if scale:
            gradient = model.apply("Mul", [gradient, factor], f"scaled{i}", (4, 8))
        model.apply("Square", [gradient], f"square{i}", (4, 8))
        model.apply("SumExt", [f"square{i}", *constants], f"sum{i}", ())
    model.apply("RealDiv", ["sum1", model.tensor("two", 2.0)], "shared", ())
    for i, name in enumerate(("sum0", "shared")):
        model.apply("ExpandDims", [name, model.constant(f"place{i}", 0)], f"term{i}", (1,))
    model.apply("MakeTuple", ["term0", "term1"], "terms", (1,))
    model.apply("AddN", ["terms"], "out", (1,))
    return model


def test_the_norm_of_all_gradients_is_one_kernel():
    model = norm()
    kernel, (weights, *gradients), _ = model.lowered("out")
    assert (kernel, gradients) == ("WeightedSquareSum", ["g0", "g1"])
    (made,) = (node for node in model.proto.graph.node if node.output[0] == weights)
    assert made.attribute[0].tensors[0].raw_data == b"\0\0\x80?\0\0\0?"  # 1 and 1/2
    assert norm(axes=(0, 1)).lowered("out")[0] == "WeightedSquareSum"


def test_the_loss_scale_multiplies_the_sum_of_squares():
    model = norm(scale=True)
    kernel, (_, *gradients), _ = model.lowered("out/unscaled")
    assert (kernel, gradients) == ("WeightedSquareSum", ["g0", "g1"])
    made = {node.output[0]: list(node.input) for node in model.proto.graph.node}
    assert made["out"] == ["out/1", "factor"] and made["out/1"] == ["out/unscaled", "factor"]


def test_other_sums_stay():
    assert norm(axes=(0,)).lowered("out")[0] == "" and norm(keep=1).lowered("out")[0] == ""
