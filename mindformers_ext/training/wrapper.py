"""One training step on any device, under the YAML name MFTrainOneStepCell.

Extends mindformers.wrapper.MFTrainOneStepCell (MindFormers 1.9.0), which reads the NPU's overflow register and drops
gradient_accumulation_steps outside semi-automatic parallelism. Importing this file registers the class below under
upstream's name, so that `runner_wrapper.type: MFTrainOneStepCell` also works on CPU. It can go when upstream checks
overflow on CPU and accumulates gradients in stand-alone and data-parallel mode.

A step whose global gradient norm is not finite is left out; with `use_skip_data_by_global_norm` one whose norm is not
below a limit, too, as upstream does. Here the limit is a parameter, which training/bad_steps.py moves while the
compiled graph stays, and the norm, which all devices share, decides alone and by one branch: upstream asks the device's
overflow register besides, which CPU has not and INFNAN mode does not set, and nests one branch in the other.

On CPU with AdamW, overflow check, clipping and update are two operators (the gradients' norm; AdamW for all weights)
instead of some thousand: see mindformers_ext/cpu_kernels.
"""

import math
from typing import Any

import numpy as np
from mindformers.core.optim import BasicAdamW
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper import MFPipelineWithLossScaleCell, MFTrainOneStepCell
from mindformers.wrapper.wrapper import _grad_scale, get_real_models, grad_scale, shard_grad_scale
from mindspore import Parameter, Tensor, get_context, nn, ops
from mindspore.common import dtype as mstype

from mindformers_ext.cpu_kernels import cells
from mindformers_ext.training.muon import Muon

CLIP_EPSILON = 1e-6  # added to the norm, as MindFormers' ClipGradNorm


def real_model(train_network: nn.Cell) -> nn.Cell:
    """Return the model (DeepseekV3ForCausalLM) inside the cells that the Trainer wraps around it."""
    return get_real_models(train_network)


def frozen_names(train_network: nn.Cell) -> set[str]:
    """Names of the weights that this training never changes: with LoRA all but the adapters, else none."""
    model = real_model(train_network)
    return model.frozen_names() if hasattr(model, "frozen_names") else set()


def norm_limit(limit: float) -> Parameter:
    """The limit of the global gradient norm; a step with a norm that is not below it, as NaN is not, is left out."""
    return Parameter(Tensor([limit], mstype.float32), name="norm_limit", requires_grad=False)


def was_left_out(step: nn.Cell, outputs: tuple) -> bool:
    """True when the step with these outputs changed no weight, moment or counter; the same on every rank.

    A loss that is not finite has gradients that are not, and their norm says so.
    """
    overflow, norm = (as_numpy(value) for value in (outputs[1], outputs[4]))
    if overflow.any() or norm is None:
        return bool(overflow.any())
    limit = step.global_norm_spike_threshold.asnumpy() if step.use_skip_data_by_global_norm else np.float32(np.inf)
    return not bool((norm < limit).all())


def as_numpy(value: Any) -> np.ndarray | None:
    """A wrapper's output; None stays None."""
    return value.asnumpy() if isinstance(value, Tensor) else value if value is None else np.asarray(value)


class ScaledLoss(nn.Cell):
    """Multiply the network's loss by a factor, so that its gradients are scaled too."""

    def __init__(self, network: nn.Cell):
        super().__init__(auto_prefix=False)
        self.network = network

    def construct(self, scale, *inputs):
        return self.network(*inputs) * scale


def can_update_at_once(step: MFTrainOneStepCell, optimizer: nn.Cell) -> bool:
    """True for plain AdamW with one learning rate, without upstream's extra reports."""
    plain = isinstance(optimizer, BasicAdamW) and not optimizer.is_group_lr and not optimizer.dynamic_weight_decay
    return plain and not step.use_grouped_lr


class WholeStep:
    """The end of a training step, for both of upstream's cells: clip, decide, update.

    Returns (loss, overflow, loss scale, learning rate, global norm before clipping), as MFLossMonitor expects; without
    clipping the norm is None.
    """

    def begin(self):
        """Replace upstream's limit, a number; called once the cell is built."""
        if self.use_skip_data_by_global_norm:
            self.global_norm_spike_threshold = norm_limit(self.global_norm_spike_threshold)
        else:
            self.global_norm_spike_threshold = Tensor([math.inf], mstype.float32)
        self.optimizer_decides = isinstance(self.optimizer, Muon)

    def is_taken(self, norm):
        """Whether the step with this norm counts, (1,)."""
        return norm < self.global_norm_spike_threshold

    def end_of_step(self, loss, grads, scale):
        """Update by these gradients, the mean over micro-batches and devices."""
        clipped, norm = self.clip_grad_norm(grads)
        if self.use_clip_grad:
            grads = clipped
        overflow = self.process_loss_scale(ops.logical_not(ops.isfinite(norm).all()))
        rate = self.learning_rate
        if self.use_grouped_lr:
            rate = self.default_lr(self.optimizer.global_step).reshape(())
            self.default_lr_parameter = rate
            for group, schedule in enumerate(self.grouped_lr):
                self.grouped_lr_parameter[group] = schedule(self.optimizer.global_step).reshape(())
        elif self.optimizer.dynamic_lr:
            schedule = self.learning_rate[-1] if self.optimizer.is_group_lr else self.learning_rate
            rate = schedule(self.optimizer.global_step).reshape(())
        taken = self.is_taken(norm)
        if self.optimizer_decides:
            loss = ops.depend(loss, self.optimizer(grads, taken))
        elif taken:
            loss = ops.depend(loss, self.optimizer(grads))
        return loss, overflow, scale, rate, norm if self.use_clip_grad else None


@MindFormerRegister.register(MindFormerModuleType.WRAPPER, alias="MFTrainOneStepCell")
class DeviceAwareTrainOneStepCell(WholeStep, MFTrainOneStepCell):
    """Forward, backward, gradient mean over micro-batches and ranks, clipping by global norm, optimizer step.

    A step whose gradients are not finite leaves the parameters unchanged and reports overflow True.

    Args:
        network: the training network; its loss is the mean over its batch.
        optimizer: a MindFormers or MindSpore optimizer.
        max_grad_norm: gradients are scaled down to this global L2 norm when use_clip_grad is True.
        accumulation_steps: micro-batches per optimizer step, cut from the batch axis of every input.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer: nn.Cell,
        use_clip_grad: bool = False,
        max_grad_norm: float = 1.0,
        scale_sense: float | Tensor | nn.Cell = 1.0,
        accumulation_steps: int = 1,
        **kwargs,
    ):
        if isinstance(scale_sense, (int, float)):
            scale_sense = Tensor(scale_sense, mstype.float32)
        super().__init__(
            network,
            optimizer,
            use_clip_grad=use_clip_grad,
            max_grad_norm=float(max_grad_norm),
            scale_sense=scale_sense,
            **kwargs,
        )
        self.begin()
        self.on_cpu = get_context("device_target") == "CPU"
        self.accumulation_steps = accumulation_steps
        self.loss_and_grads = ops.value_and_grad(ScaledLoss(network), grad_position=None, weights=self.weights)
        self.updates_at_once = self.on_cpu and can_update_at_once(self, optimizer)
        if self.updates_at_once:
            self.global_norm, self.adamw = cells.GlobalNorm(), cells.AdamWUpdate(optimizer)
            self.max_norm = Tensor([max_grad_norm], mstype.float32)
            self.not_a_number = Tensor([math.nan], mstype.float32)

    @property
    def compile_phase(self) -> str | None:
        """The name of the compiled graph; MindSpore sets it before every step, and walks through all cells for it."""
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value: str):
        if value != self._compile_phase:
            nn.Cell.compile_phase.fset(self, value)

    def construct(self, *inputs):
        """Train one step; see the class for what it returns."""
        if not self.updates_at_once:
            loss, grads, steps = self.grads_for_legacy(self.scale_sense, *inputs)
            grads = self.hyper_map(ops.partial(_grad_scale, self.scale_sense * steps), grads)
            return self.end_of_step(loss, self.grad_reducer(grads), self.scale_sense)
        loss, grads, steps = self.grads_for_legacy(self.scale_sense, *inputs)
        grads = self.grad_reducer(grads)
        factor = 1.0 / (self.scale_sense * steps).reshape((1,))  # what the gradients are multiplied with
        norm = self.global_norm(grads) * factor
        if self.use_clip_grad:
            clipped = self.max_norm / (ops.maximum(norm, self.max_norm) + CLIP_EPSILON)
            factor = factor * ops.minimum(clipped, 1.0)
        scale = self.scale_sense
        overflow = self.process_loss_scale(ops.logical_not(ops.isfinite(norm).all()))
        rate = self.optimizer.get_lr()
        taken = norm < self.global_norm_spike_threshold
        factor = ops.select(taken, factor, self.not_a_number)  # the update leaves everything as it is
        loss = ops.depend(loss, self.adamw(rate, factor, grads))
        return loss, overflow, scale, rate, norm if self.use_clip_grad else None

    def grads_for_legacy(self, scaling_sens, *inputs):
        """Return the mean loss over the micro-batches, the sum of their scaled gradients and their number.

        One forward per micro-batch: upstream calls the network a second time for the loss, which in PyNative mode
        would count every expert load twice.
        """
        if not self.on_cpu and self.accumulation_steps == 1:
            return super().grads_for_legacy(scaling_sens, *inputs)
        loss, grads = self.loss_and_grads(scaling_sens, *self.micro_batch(0, inputs))
        for index in range(1, self.accumulation_steps):
            next_loss, next_grads = self.loss_and_grads(scaling_sens, *self.micro_batch(index, inputs))
            loss = loss + next_loss
            grads = self.hyper_map(ops.add, grads, next_grads)
        steps = Tensor([self.accumulation_steps], mstype.float32)
        return loss / (scaling_sens * self.accumulation_steps), grads, steps

    def micro_batch(self, index: int, inputs: tuple) -> tuple:
        """Cut micro-batch `index` from the batch axis of every input."""
        if self.accumulation_steps == 1:
            return inputs
        micro_inputs = ()
        for value in inputs:
            size = value.shape[0] // self.accumulation_steps
            micro_inputs = micro_inputs + (value[index * size : (index + 1) * size],)
        return micro_inputs


@MindFormerRegister.register(MindFormerModuleType.WRAPPER, alias="MFPipelineWithLossScaleCell")
class PipelineTrainOneStepCell(WholeStep, MFPipelineWithLossScaleCell):
    """The step of a pipeline and of accumulated gradients."""

    def __init__(self, network: nn.Cell, optimizer: nn.Cell, **kwargs):
        super().__init__(network, optimizer, **kwargs)
        self.begin()

    @ops.add_flags(has_effect=True)
    def construct(self, *inputs):
        """Train one step; see WholeStep for what it returns."""
        scale = self.scale_sense
        loss, grads, factor = self.grads_for_legacy(scale, *inputs)
        scaled = scale * self.degree
        if self.opt_shard:
            grads = self.grad_reducer(grads)
            grads = self.hyper_map(ops.partial(shard_grad_scale, scaled, factor), grads, self.accu_grads)
        else:
            summed = self.grad_reducer(self.accu_grads)
            grads = self.hyper_map(ops.partial(grad_scale, scaled, factor), grads, summed)
        return self.end_of_step(loss, grads, scale.value())
