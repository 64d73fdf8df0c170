"""The training step against torch: clipping, AdamW, accumulation, loss scale, overflow; and the learning rate."""

import sys

import mindspore as ms
import numpy as np
import pytest
import torch
from helpers.command_line import TOY
from mindformers.core.optim import AdamW
from mindspore import Tensor

from mindformers_ext.training.lr_schedule import WarmupStableCosineStepsLR
from mindformers_ext.training.wrapper import DeviceAwareTrainOneStepCell, real_model

sys.path.append(str(TOY))  # where auto_register looks for the toy, too
from toy_model import ToyConfig, ToyForCausalLM

RATE, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.95), 1e-8


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and labels (4, 16)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 64, (4, 16)), rng.integers(0, 64, (4, 16))


def make_step(max_norm: float, **options) -> DeviceAwareTrainOneStepCell:
    """A step of a freshly initialised toy model on CPU."""
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    ms.set_seed(1)
    model = ToyForCausalLM(ToyConfig())
    optimizer = AdamW(model.trainable_params(), learning_rate=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    step = DeviceAwareTrainOneStepCell(model, optimizer, use_clip_grad=True, max_grad_norm=max_norm, **options)
    return step.set_train()


class TorchToy:
    """The toy model and its training step in torch."""

    def __init__(self, model: ToyForCausalLM, max_norm: float):
        self.weights = {p.name: torch.tensor(p.asnumpy().copy(), requires_grad=True) for p in model.trainable_params()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
        self.max_norm = max_norm

    def step(self, ids: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """Loss and gradient norm before clipping."""
        w, ids = self.weights, torch.tensor(ids)
        hidden = w["embedding"][ids] * w["scale"][ids % 4]
        logits = hidden @ w["head.weight"].T + w["head.bias"]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 64), torch.tensor(labels).reshape(-1))
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(w.values()), self.max_norm)
        self.optimizer.step()
        return loss.item(), norm.item()


@pytest.mark.parametrize(
    "max_norm,options",
    [
        (0.05, {}),  # clipped in every step
        (100.0, {}),  # never clipped
        (0.05, {"accumulation_steps": 2}),
        (0.05, {"accumulation_steps": 4, "scale_sense": 1024.0}),
        (100.0, {"scale_sense": 65536.0}),
    ],
)
def test_steps_equal_torch(max_norm: float, options: dict) -> None:
    step = make_step(max_norm, **options)
    model = real_model(step)
    reference = TorchToy(model, max_norm)
    for seed in range(4):
        ids, labels = batch(seed)
        loss, overflow, scale, rate, norm = step(Tensor(ids, ms.int32), Tensor(labels, ms.int32))
        expected_loss, expected_norm = reference.step(ids, labels)
        assert float(loss.asnumpy().item()) == pytest.approx(expected_loss, rel=2e-6)
        assert float(norm.asnumpy().item()) == pytest.approx(expected_norm, rel=2e-5)
        assert not bool(overflow.asnumpy().item())
        assert float(rate.asnumpy().item()) == pytest.approx(RATE)
        assert float(scale.asnumpy().item()) == options.get("scale_sense", 1.0)
    for parameter in model.trainable_params():
        expected = reference.weights[parameter.name].detach().numpy()
        np.testing.assert_allclose(parameter.asnumpy(), expected, atol=2e-6, err_msg=parameter.name)


def test_every_token_is_counted_once() -> None:
    step = make_step(1.0, accumulation_steps=2)
    ids, labels = batch(0)
    step(Tensor(ids, ms.int32), Tensor(labels, ms.int32))
    (_, router), *_ = real_model(step).moe_routers()
    np.testing.assert_array_equal(router.expert_load.asnumpy(), np.bincount(ids.reshape(-1) % 4, minlength=4))
    assert real_model(step).loss_parts.asnumpy()[3] == 2  # one forward a micro-batch


def test_gradients_that_are_not_finite_leave_the_weights_alone() -> None:
    step = make_step(1.0)
    real_model(step).scale[0, 0] = np.inf
    ids, labels = batch(0)
    before = {p.name: p.asnumpy().copy() for p in real_model(step).trainable_params()}
    _, overflow, *_ = step(Tensor(ids, ms.int32), Tensor(labels, ms.int32))
    assert bool(overflow.asnumpy().item())
    for parameter in real_model(step).trainable_params():
        np.testing.assert_array_equal(parameter.asnumpy(), before[parameter.name])


def test_deepseek_v3_schedule() -> None:
    """The report's four phases at their ends and in the middle (sec. 4.2), in units of 1000 steps."""
    schedule = WarmupStableCosineStepsLR(
        2.2e-4, 2.2e-5, warmup_steps=2000, stable_steps=8000, decay_steps=4300, final_lr=7.3e-6, final_start_step=14633
    )
    expected = {
        0: 0.0,
        1000: 1.1e-4,
        2000: 2.2e-4,
        9999: 2.2e-4,
        10000 + 1075: 2.2e-5 + 1.98e-4 * (1 + np.cos(np.pi / 4)) / 2,
        10000 + 2150: (2.2e-4 + 2.2e-5) / 2,
        14300: 2.2e-5,
        14632: 2.2e-5,
        14633: 7.3e-6,
        20000: 7.3e-6,
    }
    for step, rate in expected.items():
        assert float(schedule(Tensor(step, ms.int32)).asnumpy()) == pytest.approx(rate, rel=1e-4, abs=1e-12)


def test_a_schedule_without_warmup_starts_at_its_rate() -> None:
    schedule = WarmupStableCosineStepsLR(1e-3, 1e-4, warmup_steps=0, stable_steps=1, decay_steps=1)
    assert float(schedule(Tensor(0, ms.int32)).asnumpy()) == pytest.approx(1e-3)


@pytest.mark.parametrize("change", [{"lr_end": 1.0}, {"decay_steps": 0}, {"warmup_steps": -1}])
def test_schedule_refuses_what_is_out_of_order(change: dict) -> None:
    values = {"learning_rate": 1e-3, "lr_end": 1e-4, "warmup_steps": 1, "stable_steps": 1, "decay_steps": 1}
    with pytest.raises(ValueError, match="lr_schedule"):
        WarmupStableCosineStepsLR(**(values | change))


def test_a_dynamic_loss_scale_falls_on_overflow_and_rises_after_its_window() -> None:
    manager = ms.nn.DynamicLossScaleUpdateCell(loss_scale_value=1024, scale_factor=2, scale_window=2)
    step = make_step(1.0, scale_sense=manager)
    ids, labels = (Tensor(part, ms.int32) for part in batch(0))
    scales = [float(step(ids, labels)[2].asnumpy().item()) for _ in range(4)]
    assert scales == [1024, 2048, 2048, 4096]  # doubled after every second good step
    before = float(step.scale_sense.asnumpy().item())
    real_model(step).scale[0, 0] = np.inf
    assert bool(step(ids, labels)[1].asnumpy().item())
    assert float(step.scale_sense.asnumpy().item()) == before / 2
