"""Models on V3's skeleton against transformers: config.json, weights both ways, logits, loss and gradients of random
checkpoints with few layers.

Tolerances as in test_huggingface.py: logits 1e-4 absolute, gradients 1e-3 of their norm. transformers 4.57 reads what
we export; GLM and Youtu, which it does not know, are compared with transformers 5, installed once.
"""

import convert_reversed
import convert_weight
import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek3_model import DeepseekV3ForCausalLM
from deepseek32_model import DeepseekV32ForCausalLM
from helpers.hf_folders import quantise, random_tensors, write_folder
from helpers.siblings import KIMI, KIMI_0905, MOONLIGHT, V3_1, small
from helpers.transformers5 import reference
from hf_weights import HuggingFaceWeights
from mindspore import Tensor
from safetensors.torch import load_file
from transformers import DeepseekV3ForCausalLM as Transformers
from weights import from_huggingface, name_table

from mindformers_ext.training.checkpoint_monitor import load_weights
from mindformers_ext.training.pretrained import HuggingFaceFolder, resolve

SIBLINGS = {
    "moonlight": small(MOONLIGHT),
    "kimi_k2": small(KIMI),
    "kimi_k2_0905": small(KIMI_0905),
    "v3_1": small(V3_1) | {"n_group": 8, "topk_group": 4},
}


def write_released(folder, values: dict) -> dict[str, torch.Tensor]:
    """A folder as the model's makers store it; returns the tensors that it stands for, in float32."""
    tensors = random_tensors(values, torch.float32)
    files = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}  # old and unread
    for name, tensor in tensors.items():
        files[name] = tensor
        if "quantization_config" in values and name.endswith("_proj.weight") and tensor.dim() == 2:
            files[name], files[f"{name}_scale_inv"], meant = quantise(tensor)
            tensors[name] = torch.from_numpy(meant)
    write_folder(folder, values, files)
    return tensors


def check(network, ids, logits, loss, gradient, names) -> None:
    """Compare with an oracle; `gradient(name)` is that of a HuggingFace tensor, `names` is our name table."""
    inputs, labels = (Tensor(part.astype(np.int32)) for part in (ids[:, :-1], ids[:, 1:]))
    assert np.abs(network.set_train(False)(inputs).asnumpy() - logits).max() <= 1e-4
    network.set_train(True)
    parameters = [p for p in network.trainable_params() if not p.name.startswith("mtp.")]
    ours_loss, gradients = ms.value_and_grad(network, None, parameters)(inputs, labels)
    ours = {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}
    assert abs(ours_loss.asnumpy() - loss) <= 1e-5 * loss
    for entry in names:
        if entry.ours in ours:
            expected = from_huggingface(entry, gradient)
            error = np.linalg.norm(ours[entry.ours] - expected)
            assert error <= 1e-3 * np.linalg.norm(expected) + 1e-9, entry.ours


def network_of(folder, mtp_depth: int | None = None):
    """The float32 network of a folder, with its weights, as a run loads them."""
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    config = HuggingFaceWeights(folder).config
    config.compute_dtype = "float32"
    config.mtp_depth = config.mtp_depth if mtp_depth is None else mtp_depth
    if config.has_indexer:
        config.indexer_loss_factor = 0.0  # transformers has no such loss: test_sparse_attention.py
    network = (DeepseekV32ForCausalLM if config.has_indexer else DeepseekV3ForCausalLM)(config)
    load_weights(network, resolve(HuggingFaceFolder(folder, "run.yaml"), network))
    return network


@pytest.mark.parametrize("name", SIBLINGS)
def test_in_and_out_and_what_they_compute(name, tmp_path, capsys):
    meant = write_released(tmp_path / "hf", SIBLINGS[name])
    convert_weight.convert(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ours"), "--dtype", "fp32"])
    assert "2 stale rotary_emb.inv_freq left out" in capsys.readouterr().out
    convert_reversed.convert(
        ["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--export_dtype", "fp32"]
        + ["--hf_assets_path", str(tmp_path / "hf")]
    )
    back = {key: x for file in (tmp_path / "back").glob("*.safetensors") for key, x in load_file(file).items()}
    assert back.keys() == meant.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in meant.items())

    oracle = Transformers.from_pretrained(tmp_path / "back", dtype=torch.float32, attn_implementation="eager").train()
    ids = np.random.default_rng(5).integers(2, 160, (2, 41))
    logits = oracle(torch.from_numpy(ids[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten())
    loss.backward()
    gradients = {key: p.grad for key, p in oracle.named_parameters()}

    def gradient(key):
        return np.zeros(meant[key].shape, np.float32) if gradients[key] is None else gradients[key].numpy()

    network = network_of(tmp_path / "hf", mtp_depth=0)
    check(network, ids, logits.detach().numpy(), loss.item(), gradient, name_table(network.config))


@pytest.mark.slow  # installs transformers 5 once
@pytest.mark.parametrize("family", ["glm4_moe_lite", "youtu", "deepseek_v32_sparse", "deepseek_v32_short"])
def test_families_of_transformers_5(family, tmp_path):
    folder = reference(family, tmp_path / family)
    oracle = np.load(folder / "oracle.npz")
    network = network_of(folder)
    stacked = any("experts.gate_up_proj" in name for name in oracle.files)
    names = [entry for entry in name_table(network.config, stacked) if ".indexer." not in entry.ours]
    check(network, oracle["ids"], oracle["logits"], oracle["loss"], lambda key: oracle[f"gradient.{key}"], names)
