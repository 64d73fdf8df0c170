"""Multi-token prediction against an independent torch program (facts 10), float32.

Tolerances as in test_huggingface.py: loss 1e-5 relative, gradients 1e-3 relative.
"""

import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.hf_reference import hf_model, load_from_hf
from helpers.small_models import v3_config
from mindspore import Tensor
from torch.nn.functional import cross_entropy

NORMS = ("enorm", "hnorm", "shared_head_norm")


def torch_mtp_losses(hf, mtp: list[dict[str, torch.Tensor]], ids: torch.Tensor) -> list[torch.Tensor]:
    """Cross entropy of token i+k+1 at position i for each depth k = 1, 2, ... (arXiv 2412.19437, eq. 21-24).

    Sequences get shorter by one with each depth, as the paper writes them: position i needs token i+k. `hf.mtp_layers`
    are the depths' decoder layers.
    """
    norm = torch.nn.functional.rms_norm
    size = (hf.config.hidden_size,)
    hidden = hf.model(ids[:, :-1]).last_hidden_state  # after the final norm
    losses = []
    for k, (own, layer) in enumerate(zip(mtp, hf.mtp_layers, strict=True), 1):
        embedding = hf.model.embed_tokens(ids[:, k:])
        hidden = hidden[:, : embedding.shape[1]]
        joined = torch.cat((norm(embedding, size, own["enorm"], 1e-6), norm(hidden, size, own["hnorm"], 1e-6)), -1)
        x = joined @ own["eh_proj"].T
        seq = x.shape[1]
        causal = torch.full((seq, seq), torch.finfo(torch.float32).min).triu(1)[None, None]
        positions = hf.model.rotary_emb(x, torch.arange(seq)[None])
        x = layer(x, attention_mask=causal, position_embeddings=positions)
        hidden = norm(x, size, own["shared_head_norm"], 1e-6)
        losses.append(cross_entropy(hf.lm_head(hidden)[:, :-1].flatten(0, 1), ids[:, k + 1 :].flatten()))
    return losses


@pytest.mark.parametrize("depth", [1, 2])
def test_loss_parts_and_gradients(depth):
    config = v3_config(mtp_depth=depth, mtp_loss_factor=0.3)
    network = DeepseekV3ForCausalLM(config)
    deeper = hf_model(v3_config(num_layers=2 + depth))
    hf = hf_model(config)
    hf.mtp_layers = deeper.model.layers[2:]
    load_from_hf(network, config, hf)
    copy_mtp_layers(network, config, hf.mtp_layers)
    rng = np.random.default_rng(3)
    mtp = [{} for _ in range(depth)]
    for k in range(depth):
        for name in (*NORMS, "eh_proj"):
            parameter = network.parameters_dict()[f"mtp.{k}.{name}.weight"]
            value = rng.normal(0.5, 0.2, parameter.shape).astype(np.float32)
            parameter.set_data(Tensor(value))
            mtp[k][name] = torch.tensor(value, requires_grad=True)

    ids = rng.integers(2, config.vocab_size, (2, config.seq_length + 1))
    network.set_train(True)
    parameters = network.trainable_params()
    inputs, labels = Tensor(ids[:, :-1].astype(np.int32)), Tensor(ids[:, 1:].astype(np.int32))
    loss, gradients = ms.value_and_grad(network, None, parameters)(inputs, labels)
    gradients = {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}

    ids = torch.from_numpy(ids)
    main = cross_entropy(hf(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    extra = sum(torch_mtp_losses(hf, mtp, ids)) / depth
    (main + 0.3 * extra).backward()
    parts = network.loss_parts.asnumpy()
    np.testing.assert_allclose(parts[:2], [main.item(), extra.item()], rtol=1e-5)
    np.testing.assert_allclose(parts[2:], [0, 1])
    np.testing.assert_allclose(loss.asnumpy(), (main + 0.3 * extra).item(), rtol=1e-5)
    compared = {f"mtp.{k}.{n}.weight": tensor.grad for k, own in enumerate(mtp) for n, tensor in own.items()}
    compared["model.embed_tokens.weight"] = hf.model.embed_tokens.weight.grad  # reached from every loss
    compared["lm_head.weight"] = hf.lm_head.weight.grad
    for k, layer in enumerate(hf.mtp_layers):
        compared[f"mtp.{k}.layer.self_attn.o_proj.weight"] = layer.self_attn.o_proj.weight.grad
    for name, expected in compared.items():
        expected = expected.numpy()
        assert np.linalg.norm(gradients[name] - expected) <= 1e-3 * np.linalg.norm(expected), name


def test_a_depth_counts_only_tokens_that_it_predicts_from():
    """Depth k looks at token i+k: the last k-1 positions of a sequence load no expert (arXiv 2412.19437, eq. 21)."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = v3_config(mtp_depth=3)
    network = DeepseekV3ForCausalLM(config).set_train(True)
    ids = np.random.default_rng(0).integers(2, config.vocab_size, (2, config.seq_length + 1)).astype(np.int32)
    network(Tensor(ids[:, :-1]), Tensor(ids[:, 1:]))
    loads = [router.expert_load.asnumpy().sum() for name, router in network.moe_routers() if name.startswith("mtp")]
    tokens = [2 * (config.seq_length - k) for k in range(3)]
    assert loads == [config.moe_config.num_experts_chosen * count for count in tokens]


def copy_mtp_layers(network, config, layers) -> None:
    """Load the MTP decoder layers through the name table."""
    from weights import from_huggingface, name_table

    theirs = {}
    for k, layer in enumerate(layers, config.num_layers):
        theirs |= {f"model.layers.{k}.{n}": p for n, p in layer.named_parameters()}
        theirs[f"model.layers.{k}.mlp.gate.e_score_correction_bias"] = layer.mlp.gate.e_score_correction_bias
    for entry in name_table(config):
        if entry.ours.startswith("mtp.") and ".layer." in entry.ours:
            value = from_huggingface(entry, lambda name: theirs[name].detach().numpy())
            network.parameters_dict()[entry.ours].set_data(Tensor(value))
