"""The parts of a recipe that change while a training runs (config/recipe.py), and the average of the weights.

MindFormers 1.9.0 has one value of each for a whole run, and no average. It can go when upstream schedules them.
"""

from collections.abc import Mapping

import numpy as np
from mindformers.tools.logger import logger
from mindspore import Tensor, nn
from mindspore.common import dtype as mstype
from mindspore.train import Callback, RunContext

from mindformers_ext.config.recipe import micro_batch_key, phase_after, phases, tokens_per_step, value_at
from mindformers_ext.config.run import Run
from mindformers_ext.data.data_position import start_of
from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.layout import AVERAGE, Piece
from mindformers_ext.sharded_checkpoint.network import pieces_of
from mindformers_ext.sharded_checkpoint.reader import Checkpoint, load
from mindformers_ext.training.wrapper import real_model


class FollowRecipe(Callback):
    """Give every step what the recipe has for it, and end the run where its next phase begins."""

    def __init__(self, run: Run):
        super().__init__()
        self.run, self.recipe, self.phases = run, run.sections.recipe, phases(run)

    def on_train_begin(self, run_context: RunContext) -> None:
        """Check that the run has the batch of its phase."""
        step = start_of(run_context.original_args()).step
        self.phase, self.ends_after = phase_after(self.phases, step)
        if self.phase.micro_batches != self.run.micro_batches:
            raise ConfigError(
                f"{self.run.path}: {micro_batch_key(self.run)} is {self.run.micro_batches}, but after step {step} "
                f"recipe.micro_batches has {self.phase.micro_batches}; set it to that, as scripts/keep_running.sh does"
            )

    def on_train_step_begin(self, run_context: RunContext) -> None:
        """Set the values that go by the tokens before the step."""
        cb_params = run_context.original_args()
        done = start_of(cb_params).step + cb_params.cur_step_num - 1
        tokens = self.phase.tokens + (done - self.phase.step) * tokens_per_step(self.run, self.phase)
        model, own = real_model(cb_params.train_network), self.run.model
        if self.recipe.mtp_loss_factor:
            factor = value_at(self.recipe.mtp_loss_factor, tokens, own.mtp_loss_factor)
            model.mtp_factor().set_data(Tensor([factor], mstype.float32))
        if self.recipe.topk_bias_update_rate:
            usual = own.moe_config.topk_bias_update_rate
            for _, router in model.moe_routers():
                router.bias_update_rate = value_at(self.recipe.topk_bias_update_rate, tokens, usual)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """End the run with its phase."""
        cb_params = run_context.original_args()
        if start_of(cb_params).step + cb_params.cur_step_num == self.ends_after:
            run_context.request_stop()
            logger.info("the run ends after step %d: the next one has another batch", self.ends_after)


class Average(Callback):
    """Keep an exponential moving average of the weights in float32 on the host (arXiv 2412.19437, section 4.2).

    Each rank has its part. It begins as the weights are after the first step, and is saved and loaded with them.

    Args:
        source: the checkpoint that the run goes on from, if it does.
    """

    def __init__(self, decay: float, source: Checkpoint | None):
        super().__init__()
        self.decay, self.source = np.float32(decay), source
        self.pieces: dict[str, Piece] = {}

    def on_train_begin(self, run_context: RunContext) -> None:
        """Go on with the saved average."""
        cb_params = run_context.original_args()
        cb_params.average = self.pieces
        if self.source:
            self.begin(cb_params.train_network)

    def begin(self, network: nn.Cell) -> None:
        """Take what was saved, else the weights; the network has been compiled, so a rank knows its part."""
        pieces = trained(network)
        saved = set(self.source.names()) if self.source else set()
        wanted = {AVERAGE + name: piece.slot for name, piece in pieces.items() if AVERAGE + name in saved}
        read = dict(load(self.source, wanted)) if wanted else {}
        for name, piece in pieces.items():
            array = read.get(AVERAGE + name, piece.array)
            self.pieces[AVERAGE + name] = Piece(array.astype(np.float32), piece.slot)

    def on_train_step_end(self, run_context: RunContext) -> None:
        """Move the average towards the weights, unless the step was left out."""
        cb_params = run_context.original_args()
        if not self.pieces:
            self.begin(cb_params.train_network)
        if cb_params.get("left_out"):
            return
        for name, piece in trained(cb_params.train_network).items():
            average = self.pieces[AVERAGE + name].array
            average += (1 - self.decay) * (piece.array.astype(np.float32) - average)


def trained(network: nn.Cell) -> Mapping[str, Piece]:
    """What this rank holds, and no rank before it, of the weights that the training changes."""
    names = {weight.name for weight in network.optimizer.parameters}
    return {name: piece for name, piece in pieces_of(network).items() if name in names and piece.slot.copy == 0}
