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


def sliced(begin: tuple, end: tuple, strides: tuple, out: tuple, mask: int = 0) -> str:
    """Kernel of a slice of x (4, 8); "" where MindSpore's stays."""
    model = Model()
    limits = [model.constant(name, numbers) for name, numbers in dict(b=begin, e=end, s=strides).items()]
    masks = [model.constant(f"mask{i}", mask) for i in range(5)]
    model.apply("StridedSlice", [value(model, "x", 4, 8), *limits, *masks], "out", out)
    kernel, inputs, attributes = model.lowered("out")
    if kernel:
        assert inputs == ["x"] and float(attributes["first"]) == begin[1]
    return kernel


def test_slices_of_columns():
    assert sliced((0, 3), (4, 7), (1, 1), (4, 4)) == "CutColumns"
    assert sliced((0, 3), (16, 7), (1, 1), (4, 4)) == "CutColumns"  # an end of the whole cluster's tensor


@pytest.mark.parametrize(
    ("begin", "end", "strides", "out", "mask"),
    [
        ((1, 3), (4, 7), (1, 1), (3, 4), 0),  # rows too
        ((0, 0), (4, 8), (1, 2), (4, 4), 0),  # every other column
        ((0, -4), (4, 8), (1, 1), (4, 4), 0),  # counted from the end
        ((0, 3), (4, 7), (1, 1), (4, 4), 1),  # masks
    ],
)
def test_other_slices_stay(begin, end, strides, out, mask):
    assert sliced(begin, end, strides, out, mask) == ""


@pytest.mark.parametrize(
    ("limits", "kernel"),
    [
        (((0, 3), (3, 8)), "JoinColumns"),
        (((3, 8), (0, 3)), "JoinColumns"),
        (((0, 4), (3, 8)), ""),  # a column twice
        (((0, 3), (3, 7)), ""),  # the last one never
    ],
)
def test_gradients_of_columns_are_joined(limits, kernel):
    model = Model()
    shape, strides = model.constant("shape", (4, 8)), model.constant("strides", (1, 1))
    masks = [model.constant(f"mask{i}", 0) for i in range(5)]
    for first, last in limits:
        ends = [model.constant(f"{kind}{first}", end) for kind, end in (("b", (0, first)), ("e", (4, last)))]
        gradient = value(model, f"d{first}", 4, last - first)
        model.apply("StridedSliceGrad", [gradient, shape, *ends, strides, *masks], f"whole{first}", (4, 8))
    model.apply("MakeTuple", [f"whole{first}" for first, _ in limits], "both", (4, 8))
    model.apply("AddN", ["both"], "out", (4, 8))
    found, inputs, _ = model.lowered("out")
    assert found == kernel
    assert not kernel or inputs == ["d0", "d3"]


@pytest.mark.parametrize(("mask", "kernel"), [((4, 1), "MaskedRows"), ((4, 8), ""), ((1, 8), "")])
def test_masked_rows(mask, kernel):
    model = Model()
    inputs = [value(model, "x", 4, 8), value(model, "m", *mask), model.tensor("zero", 0.0)]
    model.apply("MaskedFill", inputs, "out", (4, 8))
    assert model.lowered("out")[0] == kernel


class Loss(Model):
    """MindFormers' cross entropy of logits (6, 8) as MindSpore writes it, and its gradient."""

    def __init__(self, on: float = 1.0, axis: int = -1):
        super().__init__()
        self.axis = self.constant("axis", (axis,))
        self.last = self.constant("last", -1)
        self.yes, self.no, self.depth = (self.constant(n, v) for n, v in dict(yes=1, no=0, depth=8).items())
        self.zero, self.one = self.tensor("zero", 0.0), self.tensor("one", on)
        logits = self.apply("Add", [value(self, "z", 6, 8), self.zero], "logits", (6, 8))
        self.apply("ReduceMax", [logits, self.axis, self.yes], "highest", (6, 1))
        self.apply("Sub", [logits, "highest"], "shifted", (6, 8))
        self.apply("Exp", ["shifted"], "powers", (6, 8))
        self.apply("ReduceSum", ["powers", self.axis, self.yes, self.no], "sum", (6, 1))
        self.apply("Log", ["sum"], "log_sum", (6, 1))
        self.apply("Sub", ["shifted", "log_sum"], "log_p", (6, 8))
        self.apply("OneHot", ["label", self.depth, self.one, self.zero, self.last], "chosen", (6, 8))
        self.apply("Mul", ["log_p", "chosen"], "picked", (6, 8))
        self.apply("Neg", ["picked"], "negative", (6, 8))
        self.apply("ReduceSum", ["negative", self.axis, self.no, self.no], "loss", (6,))
        self.apply("Exp", ["log_p"], "p", (6, 8))
        self.apply("Sub", ["p", "chosen"], "difference", (6, 8))
        self.apply("Mul", ["difference", value(self, "g", 6, 1)], "dz", (6, 8))
        self.apply("Muls", ["dz", self.constant("two", 2)], "scaled", (6, 8))


def test_cross_entropy_is_four_kernels():
    kernels = {name: Loss().lowered(name) for name in ("highest", "sum", "loss", "scaled")}
    row = ["z", "highest", "log_sum", "label"]
    assert {name: (kernel, inputs) for name, (kernel, inputs, _) in kernels.items()} == {
        "highest": ("RowMax", ["z"]),
        "sum": ("RowExpSum", ["z", "highest"]),
        "loss": ("SplitCrossEntropy", row),
        "scaled": ("SplitCrossEntropyGrad", [*row, "g"]),
    }
    assert float(kernels["scaled"][2]["factor"]) == 2


def test_what_is_no_cross_entropy_stays():
    smoothed = Loss(on=0.9)  # smoothed labels
    assert smoothed.lowered("loss")[0] == "" and smoothed.lowered("scaled")[0] == ""
    assert Loss(axis=0).lowered("sum")[0] == ""


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
