"""The kernels inside compiled training steps: recomputation, threads, in-place AdamW, skipped steps, bfloat16."""

import mindspore as ms
import numpy as np
import pytest
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v3_config
from mindformers.core.optim import BasicAdamW
from mindspore import Tensor

from mindformers_ext.cpu_kernels import cells, library
from mindformers_ext.training.wrapper import DeviceAwareTrainOneStepCell

OPERATORS = ("flash_attention", "fused_rope", "fused_swiglu", "fused_rms_norm", "fused_cross_entropy")
FUSED = {f"use_{name}": True for name in OPERATORS}
FUSED_MOE = dict(use_fused_ops_permute=True, use_fused_ops_topkrouter=True)


def train(steps: int = 3, fused: bool = True, **changes) -> list[float]:
    """Losses of a compiled training run of the small model from the same weights; clipping acts in every step."""
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(5)
    model, moe = (FUSED, FUSED_MOE) if fused else ({}, {})
    config = v3_config(moe=moe, **{**model, "mtp_depth": 1, **changes})
    network = DeepseekV3ForCausalLM(config)
    optimizer = BasicAdamW(network.trainable_params(), 5e-3, betas=(0.9, 0.95), weight_decay=0.1)
    step = DeviceAwareTrainOneStepCell(network, optimizer, use_clip_grad=True, max_grad_norm=0.5).set_train()
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (2, config.seq_length + 1)).astype(np.int32)
    return [float(step(Tensor(ids[:, :-1]), Tensor(ids[:, 1:]))[0].asnumpy()) for _ in range(steps)]


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """With one thread."""
    return train_with_threads(1)


def train_with_threads(count: int) -> list[float]:
    before = library.threads()
    library.set_threads(count)
    try:
        return train()
    finally:
        library.set_threads(before)


def test_fused_and_basic_operators_train_alike(losses):
    assert losses == pytest.approx(train(fused=False), rel=2e-5)
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_recomputed_layers_train_alike(losses):
    assert train(parallel_config={"recompute": {"recompute": True}}) == losses


@pytest.mark.slow
def test_more_threads_give_the_same_bits(losses):
    assert train_with_threads(3) == losses


def test_bfloat16_trains_like_float32(losses):
    assert train(compute_dtype="bfloat16") == pytest.approx(losses, rel=2e-3)


def test_a_step_that_is_not_finite_changes_nothing():
    parameters = [ms.Parameter(Tensor(np.ones((3, 5), np.float32)), name="w")]
    optimizer = BasicAdamW(parameters, 0.1, weight_decay=0.1)
    update = cells.AdamWUpdate(optimizer)
    gradients = (Tensor(np.full((3, 5), 2.0, np.float32)),)
    rate = Tensor(0.1, ms.float32)
    assert update(rate, Tensor([np.nan], ms.float32), gradients).asnumpy() == 0
    assert (parameters[0].asnumpy() == 1).all() and optimizer.global_step.asnumpy() == 0
    assert update(rate, Tensor([1.0], ms.float32), gradients).asnumpy() == 1
    assert np.allclose(parameters[0].asnumpy(), 1 - 0.1 * 0.1 - 0.1, rtol=1e-6)
    assert optimizer.global_step.asnumpy() == 1


def test_the_norm_of_many_tensors():
    arrays = [np.full(shape, 0.5, np.float32) for shape in ((3, 5), (1,), (70000,))]
    norm = cells.GlobalNorm()([Tensor(x) for x in arrays]).asnumpy()
    assert norm == pytest.approx(0.5 * np.sqrt(70016), rel=1e-6)
    arrays[1][0] = np.inf
    assert np.isinf(cells.GlobalNorm()([Tensor(x) for x in arrays]).asnumpy())


def test_a_missing_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(ImportError, match="setup.py build_ext --inplace"):
        library.library_path.__wrapped__()


def test_a_cpu_without_avx512_takes_the_build_that_every_one_runs(monkeypatch):
    monkeypatch.setattr(library, "has_avx512", lambda: False)
    path = library.library_path.__wrapped__()
    assert path.name.startswith("_kernels.")
    monkeypatch.setattr(library, "library_path", lambda: path)
    x, weight = (np.random.default_rng(0).standard_normal((37, 24), np.float32) for _ in range(2))
    norm = cells.RmsNorm(1e-6)(Tensor(x), Tensor(np.ones(24, np.float32))).asnumpy()
    assert np.allclose(norm, x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6), rtol=1e-5, atol=1e-6)
    assert np.allclose(cells.Linear()(Tensor(x), Tensor(weight)).asnumpy(), x @ weight.T, rtol=1e-4, atol=1e-5)
