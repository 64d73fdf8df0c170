"""Muon against torch.optim.Muon in float32, every HuggingFace matrix one of torch's; the rest against AdamW."""

import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.small_models import v3_config
from mindspore import Tensor

from mindformers_ext.training.muon import Muon

RATE, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.95), 1e-8
STEPS = 4


def torch_matrices(name: str, value: np.ndarray) -> list[np.ndarray]:
    """The matrices of one of our weights, as views of it."""
    if value.ndim < 3:
        return [value]
    halves = np.split(value, 2, -1) if name.endswith("gate_up_proj") else [value]
    return [expert for half in halves for expert in half]


def is_matrix(name: str, value: np.ndarray) -> bool:
    others = ("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")
    return value.ndim > 1 and not name.endswith(others)


def test_steps_equal_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    model = DeepseekV3ForCausalLM(v3_config(mtp_depth=1))
    weights = model.trainable_params()
    schedule = [RATE * (i + 1) for i in range(STEPS)]
    optimizer = Muon(weights, schedule, weight_decay=DECAY, adamw_betas=BETAS, adamw_eps=EPS, model=model)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())  # torch rounds whatever it is given

    values = {weight.name: weight.asnumpy().copy() for weight in weights}
    matrices = {n: [torch.tensor(m.copy()) for m in torch_matrices(n, v)] for n, v in values.items() if is_matrix(n, v)}
    others = {n: torch.tensor(v) for n, v in values.items() if n not in matrices}
    assert sum(len(found) for found in matrices.values()) > 60 and len(others) > 10
    flat = [matrix for found in matrices.values() for matrix in found]
    muon = torch.optim.Muon(flat, lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)

    rng = np.random.default_rng(1)
    for step in range(STEPS):
        gradients = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in values.items()}
        before = [weight.asnumpy().copy() for weight in optimizer.get_parameters()]
        optimizer(tuple(Tensor(gradients[w.name] * np.nan) for w in weights), Tensor([False]))
        for weight, value in zip(optimizer.get_parameters(), before, strict=True):
            np.testing.assert_array_equal(weight.asnumpy(), value, err_msg=weight.name)
        optimizer(tuple(Tensor(gradients[w.name]) for w in weights), Tensor([True]))
        for rule in (muon, adamw):
            rule.param_groups[0]["lr"] = schedule[step]
        for name, found in matrices.items():
            for matrix, gradient in zip(found, torch_matrices(name, gradients[name]), strict=True):
                matrix.grad = torch.tensor(gradient.copy())
        for name, value in others.items():
            value.grad = torch.tensor(gradients[name])
        muon.step()
        adamw.step()
    assert int(optimizer.global_step.asnumpy()[0]) == STEPS
    for weight in weights:
        ours = torch_matrices(weight.name, weight.asnumpy())
        expected = matrices.get(weight.name, [others.get(weight.name)])
        for mine, theirs in zip(ours, expected, strict=True):
            np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=5e-6, err_msg=weight.name)


def test_states_are_float32_where_weights_are_not() -> None:
    """A moment in bfloat16 would lose what a step adds. (MindSpore's CPU cannot assign bfloat16: no step here.)"""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    model = DeepseekV3ForCausalLM(v3_config(param_init_type="bfloat16"))
    weights = model.trainable_params()
    optimizer = Muon(weights, RATE, model=model)
    assert {state.dtype for state in (*optimizer.first, *optimizer.second)} == {ms.float32}


OPERATORS = ("use_flash_attention", "use_fused_rope")


@pytest.mark.parametrize(("operators", "q_lora_rank"), [((), None), (OPERATORS, 32)], ids=["basic", "at once"])
def test_attention_logits_are_clipped(operators: tuple[str, ...], q_lora_rank: int | None) -> None:
    """Weights that grew too large give, after a step of rate 0, logits of at most the threshold in every head."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    options = dict.fromkeys(operators, True) | {"mtp_depth": 1, "q_lora_rank": q_lora_rank, "initializer_range": 0.2}
    model = DeepseekV3ForCausalLM(v3_config(track_max_attention_logit=True, **options))
    model.set_train()
    weights = model.trainable_params()
    rng = np.random.default_rng(0)
    ids = Tensor(rng.integers(2, 128, (2, 24)), ms.int32)

    def largest() -> np.ndarray:
        for _, logits in model.attention_logits():
            logits.set_data(Tensor(np.full(logits.shape, -np.inf, np.float32)))
        model(ids, ids)
        return np.stack([logits.asnumpy() for _, logits in model.attention_logits()])

    first, before = largest(), {weight.name: weight.asnumpy().copy() for weight in weights}
    threshold = float(np.median(first[0]))
    optimizer = Muon(weights, 0.0, weight_decay=0.0, qk_clip_threshold=threshold, model=model)
    optimizer(tuple(Tensor(np.ones(weight.shape, np.float32)) for weight in weights), Tensor([True]))
    changed = {name for name in before if np.any(before[name] != model.parameters_dict()[name].asnumpy())}
    assert changed and all(name.endswith(("q_b_proj.weight", "q_proj.weight", "kv_b_proj.weight")) for name in changed)
    # What the first layer sees has not changed; the others see what it makes of the same values and other weights.
    np.testing.assert_allclose(largest()[0], np.minimum(first[0], threshold), rtol=1e-5)


def test_the_largest_logits_are_those_of_the_scores() -> None:
    """All three ways to attend find the same ones."""
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU")
    found = []
    for operators in ((), OPERATORS[:1], OPERATORS):
        ms.set_seed(1)
        model = DeepseekV3ForCausalLM(v3_config(track_max_attention_logit=True, **dict.fromkeys(operators, True)))
        model.set_train()
        model(*(Tensor(np.arange(48).reshape(2, 24) + 2, ms.int32),) * 2)
        found.append(np.stack([logits.asnumpy() for _, logits in model.attention_logits()]))
    assert np.isfinite(found[0]).all()
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-6)
