"""A callback that writes down what verify_parallel.py compares: losses, first gradients, final parameters."""

import time
from pathlib import Path

import numpy as np
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.train import Callback, RunContext

from mindformers_ext.files.atomic import write_json
from mindformers_ext.sharded_checkpoint.shards import FIRST_MOMENTS
from mindformers_ext.training.certain_elements import CertainElements
from mindformers_ext.training.metrics import take_loss_parts, total_loss
from mindformers_ext.training.wrapper import real_model


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class ParallelCheck(Callback):
    """Write moments.npz after the first step, certain.npz, final.npz and result.json after the last (see run_rank.py).

    Args:
        folder: where to; on a rank of a lowered run its own folder rank_R inside.
    """

    def __init__(self, folder: str):
        super().__init__()
        self.folder = Path(folder)
        self.outputs: list[list[float | None]] = []
        self.seconds: list[float] = []
        self.certain = CertainElements()

    def on_train_begin(self, run_context: RunContext) -> None:
        """Find out what this process holds."""
        self.network = run_context.original_args().train_network
        if hasattr(self.network, "job"):
            self.folder = self.folder / f"rank_{self.network.job.rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start = time.perf_counter()

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Note the loss: the mean over micro-batches, None on a pipeline stage that has none."""
        model = real_model(self.network)
        self.outputs.append([total_loss(model, *take_loss_parts(model))])
        self.seconds.append(time.perf_counter() - self.start)
        moments = self._values(FIRST_MOMENTS)
        self.certain.note(moments)
        if len(self.seconds) == 1:
            np.savez(self.folder / "moments.npz", **moments)
        self.start = time.perf_counter()

    def on_train_end(self, run_context: RunContext) -> None:
        """Write the parameters and the losses."""
        self.certain.save(self.folder / "certain.npz")
        np.savez(self.folder / "final.npz", **self._values())
        write_json(self.folder / "result.json", {"outputs": self.outputs, "seconds": self.seconds})

    def _values(self, prefixes: tuple[str, ...] = ("",)) -> dict[str, np.ndarray]:
        """The parameters that this process stores; a rank's are parts."""
        lowered = hasattr(self.network, "stored")
        stored = {n: p.value for n, p in self.network.stored()} if lowered else self.network.parameters_dict()
        return {n: p.asnumpy() for n, p in stored.items() if n.startswith(prefixes)}
