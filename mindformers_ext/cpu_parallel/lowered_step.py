"""The training step of a rank on CPU: its own lowered graph behind the face of MindFormers' training wrapper.

Extends mindformers.wrapper.MFTrainOneStepCell (1.9.0) through our CPU version. The Trainer builds model, optimizer
and data as for one process; this cell cuts their values into the rank's shards, into which a checkpoint of any layout
is loaded, and runs the rank's graph in place of `construct`. Small state that callbacks read and write on the model
(router biases, loads, loss parts) is copied between both around every step.
"""

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import Parameter, Tensor

from mindformers_ext.collectives.rank_job import RankJob
from mindformers_ext.cpu_parallel.run_rank import load_graph, rank_folder
from mindformers_ext.sharded_checkpoint.shards import GRADIENT_BUFFERS, Slot, layout_for, owner_of, slot_of
from mindformers_ext.training.wrapper import DeviceAwareTrainOneStepCell, frozen_names


class StoredParameter(NamedTuple):
    """What this rank stores of a parameter."""

    value: Parameter
    slot: Slot


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class LoweredTrainStep(DeviceAwareTrainOneStepCell):
    """Run the rank's lowered graph; arguments and outputs as DeviceAwareTrainOneStepCell.

    Inputs are the global batch, of which the rank takes its part.
    """

    def __init__(self, network, optimizer, **kwargs):
        super().__init__(network, optimizer, **kwargs)
        self.job = RankJob.current()
        own = rank_folder(self.job.folder, self.job.rank)
        self.rank_facts = json.loads((own / "compiled.json").read_text())
        self.graph = None
        self.graph_path = own / "cpu.mindir"
        self.mirrored: dict[str, tuple[Parameter, Parameter]] = {}  # the graph's and the model's
        self.full_shapes: dict[str, tuple[int, ...]] = {}  # of the model's parameters; the graph's have the same names

    def __call__(self, *inputs):
        """One step; outputs of the graph: loss, overflow, loss scale, learning rate, gradient norm."""
        if self.graph is None:
            self._load_graph()
        for ours, theirs in self.mirrored.values():  # what callbacks have written
            ours.set_data(Tensor(theirs.asnumpy(), ours.dtype))
        outputs = self.graph(*(self._own_part(x, i) for i, x in enumerate(inputs)))
        for ours, theirs in self.mirrored.values():
            theirs.set_data(Tensor(ours.asnumpy(), theirs.dtype))
        return outputs

    def stored(self) -> Iterator[tuple[str, StoredParameter]]:
        """(name, what this rank holds) of every parameter of its graph, gradient buffers left out."""
        if self.graph is None:
            self._load_graph()
        for parameter in self.graph.get_parameters():
            if not parameter.name.startswith(GRADIENT_BUFFERS):
                _, value = self.mirrored.get(parameter.name, (None, parameter))  # a checkpoint's goes to the model
                yield parameter.name, StoredParameter(value, self._slot(parameter))

    def _slot(self, parameter: Parameter) -> Slot:
        name, layout = parameter.name, layout_for(parameter.name, self.rank_facts["layouts"])
        return slot_of(name, parameter.shape, layout, self.job.index, self.full_shapes[name])

    def _load_graph(self) -> None:
        """Load the graph and give it this rank's part of the values that model and optimizer have now."""
        whole = self.parameters_dict()
        self.full_shapes = {name: tuple(parameter.shape) for name, parameter in whole.items()}
        graph = load_graph(self.graph_path)
        weights = {parameter.name for parameter in self.optimizer.parameters} | frozen_names(self)
        for parameter in graph.get_parameters():
            if parameter.name.startswith(GRADIENT_BUFFERS):
                parameter.set_data(Tensor(np.zeros(parameter.shape), parameter.dtype))
                continue
            source = whole.get(parameter.name)
            if source is None:
                raise ValueError(f"parameter '{parameter.name}' of the rank's graph is not in the model")
            part = self._slot(parameter).cut(source.asnumpy())
            parameter.set_data(Tensor(part, parameter.dtype))
            if owner_of(parameter.name, weights) is None:
                if part.shape != source.shape:
                    raise ValueError(
                        f"'{parameter.name}' is split over ranks, but callbacks need it whole: give the operator that "
                        "writes it a plan in sharding.py"
                    )
                self.mirrored[parameter.name] = parameter, source
        self.graph = graph

    def _own_part(self, whole: Tensor, index: int) -> Tensor:
        """This rank's part of the global batch, as its graph takes it."""
        shape = self.rank_facts["inputs"][index]
        if list(whole.shape) == shape:
            return whole
        if whole.shape[0] % shape[0] or list(whole.shape[1:]) != shape[1:]:
            raise ValueError(
                f"input {index} of the step has shape {tuple(whole.shape)}, but rank {self.job.rank}'s graph takes "
                f"{tuple(shape)}: the YAML has changed since the graph was compiled"
            )
        first = self.job.data_rank * shape[0]
        return whole[first : first + shape[0]]
