"""DeepSeek-V3's learning rate over training (report, sec. 4.2), under the YAML name WarmupStableCosineStepsLR.

MindFormers 1.9.0 has no schedule of this shape: its WarmUpStableDecayLR decays linearly and to one final rate. The
file can go when upstream has it.
"""

import math

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore import dtype as mstype
from mindspore import ops
from mindspore.nn.learning_rate_schedule import LearningRateSchedule


@MindFormerRegister.register(MindFormerModuleType.LR)
class WarmupStableCosineStepsLR(LearningRateSchedule):
    """Linear warm-up, constant, cosine decay, then constant steps.

    Args:
        learning_rate: rate after the warm-up.
        lr_end: rate at the end of the cosine and during the first constant step.
        warmup_steps: steps of the linear rise from 0.
        stable_steps: steps at learning_rate after the warm-up.
        decay_steps: steps of the cosine from learning_rate to lr_end.
        final_lr: rate of the last phase; lr_end when not given.
        final_start_step: first step of the last phase; never when not given.
        total_steps: filled in by the Trainer; this schedule does not depend on it.

    Raises:
        ValueError: a rate or a number of steps that is out of order.
    """

    def __init__(
        self,
        learning_rate: float,
        lr_end: float,
        warmup_steps: int,
        stable_steps: int,
        decay_steps: int,
        final_lr: float | None = None,
        final_start_step: int | None = None,
        total_steps: int | None = None,
        **trainer_options,
    ):
        super().__init__()
        if not 0 <= lr_end <= learning_rate:
            raise ValueError(
                f"lr_schedule.lr_end is {lr_end}, but must lie between 0 and learning_rate {learning_rate}"
            )
        if warmup_steps < 0 or stable_steps < 0 or decay_steps < 1:
            raise ValueError(
                f"lr_schedule: warmup_steps {warmup_steps} and stable_steps {stable_steps} must not be negative, "
                f"decay_steps {decay_steps} must be at least 1"
            )
        self.learning_rate = learning_rate
        self.lr_end = lr_end
        self.warmup_steps = warmup_steps
        self.decay_start = warmup_steps + stable_steps
        self.decay_steps = decay_steps
        self.final_lr = lr_end if final_lr is None else final_lr
        self.final_start = 2**30 if final_start_step is None else final_start_step
        self.warmup_lr_init = 0.0

    def construct(self, global_step):
        """The rate of step `global_step` (from 0), a float32 scalar."""
        step = ops.cast(global_step, mstype.float32)
        warmup = self.learning_rate * step / max(self.warmup_steps, 1)
        progress = ops.clamp((step - self.decay_start) / self.decay_steps, 0.0, 1.0)
        cosine = self.lr_end + 0.5 * (self.learning_rate - self.lr_end) * (1.0 + ops.cos(progress * math.pi))
        rate = ops.select(step < self.warmup_steps, warmup, cosine)
        return ops.select(step < self.final_start, rate, ops.full_like(rate, self.final_lr))
