"""Logits, loss and gradients against transformers 4.57 in float32 on CPU.

Tolerances: logits differ by the order of float32 sums only, 1e-4 absolute at logits of order 1-10; a gradient's
relative error |g - g_hf| / |g_hf| (Euclidean norms) stays within 1e-3.
"""

import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek2_model import DeepseekV2ForCausalLM
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.hf_reference import gradients_as_hf, hf_model, hf_tensors, load_from_hf
from helpers.small_models import v2_config, v3_config
from mindspore import Tensor

YARN = dict(
    extend_method="YARN",
    scaling_factor=dict(factor=40.0, original_max_position_embeddings=8, beta_fast=32, beta_slow=1),
    max_position_embeddings=320,
)
ODD = dict(seq_length=19, hidden_size=37, num_heads=3, vocab_size=101, v_head_dim=7)
OPERATORS = ("flash_attention", "fused_rope", "fused_swiglu", "fused_rms_norm", "fused_cross_entropy")
FUSED = {f"use_{name}": True for name in OPERATORS}
FUSED_MOE = dict(use_fused_ops_permute=True, use_fused_ops_topkrouter=True)
V3 = {
    "released_shape": v3_config(),
    "no_q_lora": v3_config(q_lora_rank=None),
    "yarn": v3_config(**YARN),
    "negative_bias": v3_config(),
    "top1": v3_config(moe=dict(num_experts_chosen=1, norm_topk_prob=False)),
    "one_group": v3_config(moe=dict(n_group=1, topk_group=1)),
    "no_shared_expert": v3_config(moe=dict(shared_expert_num=0)),
    "two_shared_experts": v3_config(moe=dict(shared_expert_num=2)),
    "dense_only": v3_config(moe=dict(expert_num=1, num_experts_chosen=1, n_group=1, topk_group=1)),
    "moe_only": v3_config(moe=dict(first_k_dense_replace=0)),
    "odd_sizes": v3_config(**ODD, moe=dict(moe_intermediate_size=13)),
    "moonlight_norms": v3_config(rms_norm_eps=1e-5, theta=50000.0),
    "large_eps": v3_config(rms_norm_eps=0.03, theta=500.0),  # of all norms but the latents'
    "tied_embeddings": v3_config(tie_word_embeddings=True),
    "capacity_suffices": v3_config(moe=dict(use_gmm=False, capacity_factor=8.0)),
    "fused": v3_config(**FUSED, moe=FUSED_MOE),
    "fused_negative_bias": v3_config(**FUSED, moe=FUSED_MOE),
    "fused_yarn": v3_config(**YARN, **FUSED, moe=FUSED_MOE),
    "fused_tied_embeddings": v3_config(tie_word_embeddings=True, **FUSED, moe=FUSED_MOE),
    "fused_large_eps": v3_config(rms_norm_eps=0.03, theta=500.0, **FUSED, moe=FUSED_MOE),
    "fused_odd_sizes": v3_config(**ODD, **FUSED, moe=dict(moe_intermediate_size=13) | FUSED_MOE),
}
V2 = {
    "v2_lite": v2_config(q_lora_rank=None),
    "v2": v2_config(moe=dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0)),
    "v2_large_eps": v2_config(rms_norm_eps=0.03, theta=1e6),
    "fused_v2": v2_config(**FUSED, moe=FUSED_MOE | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2)),
}


GRAPH = (
    "released_shape",
    "v2",
    "fused",
    "fused_v2",
)  # compiled as in training; the others run operator by operator, which is faster


@pytest.mark.parametrize("name", [*V3, *V2])
def test_logits_loss_and_gradients(name):
    compare(name, ms.GRAPH_MODE if name in GRAPH else ms.PYNATIVE_MODE)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in [*V3, *V2] if name not in GRAPH])
def test_every_configuration_compiled(name):
    compare(name, ms.GRAPH_MODE)


def compare(name, mode):
    """Our network and transformers' on the same weights and tokens."""
    ms.set_context(mode=mode)
    config = V3[name] if name in V3 else V2[name]
    network = (DeepseekV3ForCausalLM if name in V3 else DeepseekV2ForCausalLM)(config)
    reference = hf_model(config)
    rng = np.random.default_rng(7)
    for tensor_name, bias in hf_tensors(reference).items():
        if tensor_name.endswith("e_score_correction_bias"):
            low, high = (-3.0, -1.5) if "negative_bias" in name else (-0.1, 0.1)
            bias.copy_(torch.from_numpy(rng.uniform(low, high, bias.shape).astype(np.float32)))
    load_from_hf(network, config, reference)
    ids = rng.integers(2, config.vocab_size, (2, config.seq_length + 1)).astype(np.int32)
    inputs, labels = ids[:, :-1], ids[:, 1:]

    hf_logits = reference(torch.from_numpy(inputs).long()).logits
    hf_loss = torch.nn.functional.cross_entropy(hf_logits.flatten(0, 1), torch.from_numpy(labels).long().flatten())
    hf_loss.backward()

    network.set_train(False)
    logits = network(Tensor(inputs)).asnumpy()
    assert np.abs(logits - hf_logits.detach().numpy()).max() <= 1e-4

    network.set_train(True)
    parameters = network.trainable_params()
    loss, gradients = ms.value_and_grad(network, None, parameters)(Tensor(inputs), Tensor(labels))
    assert abs(loss.asnumpy() - hf_loss.item()) <= 1e-5 * hf_loss.item()
    ours = gradients_as_hf(config, {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)})
    for tensor_name, tensor in reference.named_parameters():
        if tensor.numel() == 0:  # a shared expert of width 0
            continue
        expected = tensor.grad.numpy() if tensor.grad is not None else np.zeros(tensor.shape)
        error = np.linalg.norm(ours[tensor_name] - expected)
        assert error <= 1e-3 * np.linalg.norm(expected) + 1e-9, tensor_name
