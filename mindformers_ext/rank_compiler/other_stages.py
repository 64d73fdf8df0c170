"""Leave the layers of other pipeline stages out of a rank's compilation: their place is kept, their content is not.

MindSpore 2.9 parses and differentiates the whole model on every rank, and cuts it into stages only then; of 61 layers
a rank of 16 stages keeps four. A layer of another stage is replaced by one that hands on what the real one would: the
hidden states and a balance loss. The rank's own graph is the same, messages to its neighbours included
(tests/rank_compiler/test_other_stages.py compares the two).
"""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype


class Elsewhere(nn.Cell):
    """In place of a decoder layer of another stage: its first norm, and a number for its balance loss.

    Both have parameters, or the compiler would take them out.
    """

    is_moe = False

    def __init__(self, layer: nn.Cell, name: str):
        super().__init__()
        self.norm = layer.input_layernorm
        self.norm.weight.name = f"{name}.norm"
        self.pipeline_stage = layer.pipeline_stage
        if hasattr(layer, "_pipeline_segment"):  # of a folded pipeline
            self.pipeline_segment = layer.pipeline_segment
        self.loss = Parameter(Tensor([0.0], mstype.float32), name=f"{name}.loss")
        self.add = ops.Add()

    def construct(self, x, mask, token_mask, batch, position_ids=None):
        return self.norm(x), self.add(self.loss, self.loss)


def leave_out_other_stages(model: nn.Cell, stage: int) -> None:
    """Replace every decoder layer of `model` that is not on `stage`, in place; before the optimizer is built."""
    layers = model.model.layers
    for index, layer in enumerate(list(layers)):
        if layer.pipeline_stage != stage:
            layers._cells[str(index)] = Elsewhere(layer, f"elsewhere.{index}")  # its setter renames what it finds
    for depth, predictor in enumerate(getattr(model, "mtp", ())):
        if predictor.layer.pipeline_stage != stage:
            predictor._cells["layer"] = Elsewhere(predictor.layer, f"elsewhere.mtp.{depth}")
