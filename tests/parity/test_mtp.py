"""Multi-token prediction against an independent torch program (facts 10), float32.

Tolerances as in test_huggingface.py: loss 1e-5 relative, gradients 1e-3 relative.
"""

import mindspore as ms
import numpy as np
import torch
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.hf_reference import hf_model, load_from_hf
from helpers.small_models import v3_config
from mindspore import Tensor
from torch.nn.functional import cross_entropy


def torch_mtp_loss(hf, mtp: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of token i+2 at position i; `hf`'s second decoder layer serves as MTP's layer."""
    norm = torch.nn.functional.rms_norm
    inputs, next_tokens, after_next = ids[:, :-1], ids[:, 1:], ids[:, 2:]
    hidden = hf.model(inputs).last_hidden_state  # after the final norm
    embedding = hf.model.embed_tokens(next_tokens)
    size = (hidden.shape[-1],)
    joined = torch.cat((norm(embedding, size, mtp["enorm"], 1e-6), norm(hidden, size, mtp["hnorm"], 1e-6)), -1)
    x = joined @ mtp["eh_proj"].T
    seq = x.shape[1]
    causal = torch.full((seq, seq), torch.finfo(torch.float32).min).triu(1)[None, None]
    positions = hf.model.rotary_emb(x, torch.arange(seq)[None])
    x = hf.mtp_layer(x, attention_mask=causal, position_embeddings=positions)
    logits = hf.lm_head(norm(x, size, mtp["shared_head_norm"], 1e-6))
    return cross_entropy(logits[:, :-1].flatten(0, 1), after_next.flatten())


def test_loss_parts_and_gradients():
    config = v3_config(mtp_depth=1, mtp_loss_factor=0.3)
    network = DeepseekV3ForCausalLM(config)
    deeper = hf_model(v3_config(num_layers=3))
    hf = hf_model(config)
    hf.mtp_layer = deeper.model.layers[2]
    load_from_hf(network, config, hf)
    theirs = {f"model.layers.2.{n}": p for n, p in hf.mtp_layer.named_parameters()}
    theirs["model.layers.2.mlp.gate.e_score_correction_bias"] = hf.mtp_layer.mlp.gate.e_score_correction_bias
    copy_mtp_layer(network, config, theirs)
    rng = np.random.default_rng(3)
    mtp = {}
    for name in ("enorm", "hnorm", "eh_proj", "shared_head_norm"):
        parameter = network.parameters_dict()[f"mtp.0.{name}.weight"]
        value = rng.normal(0.5, 0.2, parameter.shape).astype(np.float32)
        parameter.set_data(Tensor(value))
        mtp[name] = torch.tensor(value, requires_grad=True)

    ids = rng.integers(2, config.vocab_size, (2, config.seq_length + 1))
    network.set_train(True)
    parameters = network.trainable_params()
    inputs, labels = Tensor(ids[:, :-1].astype(np.int32)), Tensor(ids[:, 1:].astype(np.int32))
    loss, gradients = ms.value_and_grad(network, None, parameters)(inputs, labels)
    gradients = {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}

    ids = torch.from_numpy(ids)
    main = cross_entropy(hf(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    extra = torch_mtp_loss(hf, mtp, ids)
    (main + 0.3 * extra).backward()
    parts = network.loss_parts.asnumpy()
    np.testing.assert_allclose(parts[:2], [main.item(), extra.item()], rtol=1e-5)
    np.testing.assert_allclose(parts[2:], [0, 1])
    np.testing.assert_allclose(loss.asnumpy(), (main + 0.3 * extra).item(), rtol=1e-5)
    compared = {f"mtp.0.{name}.weight": tensor.grad for name, tensor in mtp.items()}
    compared["model.embed_tokens.weight"] = hf.model.embed_tokens.weight.grad  # reached from both losses
    compared["lm_head.weight"] = hf.lm_head.weight.grad
    compared["mtp.0.layer.self_attn.o_proj.weight"] = hf.mtp_layer.self_attn.o_proj.weight.grad
    for name, expected in compared.items():
        expected = expected.numpy()
        assert np.linalg.norm(gradients[name] - expected) <= 1e-3 * np.linalg.norm(expected), name


def copy_mtp_layer(network, config, theirs: dict[str, torch.Tensor]) -> None:
    """Load the MTP decoder layer through the name table."""
    from weights import from_huggingface, name_table

    for entry in name_table(config):
        if entry.ours.startswith("mtp.0.layer."):
            value = from_huggingface(entry, lambda name: theirs[name].detach().numpy())
            network.parameters_dict()[entry.ours].set_data(Tensor(value))
