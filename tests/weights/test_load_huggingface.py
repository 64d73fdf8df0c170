"""A HuggingFace folder loaded straight into the model gives transformers' logits (1e-4, float32)."""

import json
import math

import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek2_model import DeepseekV2ForCausalLM
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.hf_folders import V2_LITE_CONFIG, V3_CONFIG, quantise, random_tensors, write_folder
from helpers.hf_reference import mask_with_minus_infinity
from hf_config import config_from_hf, read_config
from mindspore import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from mindformers_ext.errors import ConfigError
from mindformers_ext.sharded_checkpoint.reader import open_source
from mindformers_ext.training.checkpoint_monitor import load_weights
from mindformers_ext.training.pretrained import HuggingFaceFolder, resolve

NO_MTP = {**V3_CONFIG, "num_nextn_predict_layers": 0}
TWO_DEPTHS = {**V3_CONFIG, "num_nextn_predict_layers": 2}


@pytest.fixture(autouse=True)
def operator_by_operator():
    """No compilation: the numbers are the same."""
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")


def network_of(folder, mtp_depth: int):
    """A float32 network of the folder's config.json, random weights."""
    config = config_from_hf(read_config(folder), mtp_depth)
    config.compute_dtype = "float32"
    network = (DeepseekV2ForCausalLM if config.model_type == "deepseekv2" else DeepseekV3ForCausalLM)(config)
    return network.set_train(False)


def load_huggingface(network, folder) -> None:
    """Load as a run does whose load_checkpoint is a HuggingFace folder."""
    load_weights(network, resolve(HuggingFaceFolder(folder, "run.yaml"), network))


def transformers_logits(folder, ids: np.ndarray) -> np.ndarray:
    """Logits of transformers' own reading of the folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for router in (m for m in model.modules() if isinstance(m, DeepseekV3TopkRouter)):
        mask_with_minus_infinity(router)
    for attention in (m for m in model.modules() if isinstance(m, DeepseekV2Attention)):
        rope = model.config.rope_scaling  # transformers 4.57 leaves out V2's temperature (facts 8)
        attention.scaling *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    return model(torch.from_numpy(ids).long()).logits.detach().numpy()


CASES = {
    "v3_mtp": (V3_CONFIG, 1),
    "v3_mtp_left_out": (V3_CONFIG, 0),
    "v3_second_depth_left_out": (TWO_DEPTHS, 1),
    "v3": (NO_MTP, 0),
    "v3_tied": ({**V3_CONFIG, "tie_word_embeddings": True}, 1),
    "v2_lite": (V2_LITE_CONFIG, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path, case):
    config, mtp_depth = CASES[case]
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    folder = write_folder(tmp_path, plain, random_tensors(plain, torch.float32))
    network = network_of(folder, mtp_depth)
    load_huggingface(network, folder)
    ids = np.random.default_rng(0).integers(2, 128, (2, 24)).astype(np.int32)
    assert np.abs(network(Tensor(ids)).asnumpy() - transformers_logits(folder, ids)).max() <= 1e-4


def test_fp8_and_mtp_weights_arrive(tmp_path):
    tensors = random_tensors(V3_CONFIG)
    name = "model.layers.2.eh_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"], values = quantise(tensors[name])
    network = network_of(write_folder(tmp_path, V3_CONFIG, tensors), 1)
    load_huggingface(network, tmp_path)
    assert np.array_equal(network.mtp[0].eh_proj.weight.asnumpy(), values)
    stack = network.mtp[0].layer.mlp.experts.gate_up_proj.asnumpy()
    expert = tensors["model.layers.2.mlp.experts.11.up_proj.weight"].float().numpy()
    assert np.array_equal(stack[11, :, 20:], expert.T)


def test_each_depth_gets_its_own_layer(tmp_path):
    tensors = random_tensors(TWO_DEPTHS)
    network = network_of(write_folder(tmp_path, TWO_DEPTHS, tensors), 2)
    load_huggingface(network, tmp_path)
    for depth, predictor in enumerate(network.mtp):
        layer = f"model.layers.{2 + depth}"
        assert np.array_equal(predictor.eh_proj.weight.asnumpy(), tensors[f"{layer}.eh_proj.weight"].float().numpy())
        gate = tensors[f"{layer}.mlp.gate.weight"].float().numpy()
        assert np.array_equal(predictor.layer.mlp.gate.weight.asnumpy(), gate)


MISMATCHES = {
    "size": ({"hidden_size": 52}, None, "hidden_size is 52, but model_config.hidden_size of the YAML is 48"),
    "positions": ({"rope_scaling": None}, None, "rope_scaling is None, but the YAML has extend_method 'YARN'"),
    "no_mtp_files": ({}, "model.layers.2.", "'model.layers.2.*' .* is missing"),
    "lost": ({}, "model.norm.weight", "'model.norm.weight' is missing"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatches_are_refused_before_anything_is_loaded(tmp_path, name):
    changes, lost, message = MISMATCHES[name]
    tensors = random_tensors(V3_CONFIG)
    network = network_of(write_folder(tmp_path, V3_CONFIG, tensors), 1)
    kept = {key: tensor for key, tensor in tensors.items() if not (lost and key.startswith(lost))}
    write_folder(tmp_path, {**V3_CONFIG, **changes}, kept)
    before = {p.name: p.asnumpy().copy() for p in network.get_parameters()}
    with pytest.raises(ConfigError, match=message):
        load_huggingface(network, tmp_path)
    assert all(np.array_equal(p.asnumpy(), before[p.name]) for p in network.get_parameters())


def test_another_model_says_so(tmp_path):
    folder = write_folder(tmp_path, V3_CONFIG, random_tensors(V3_CONFIG))
    with pytest.raises(ConfigError, match="is a HuggingFace folder of another model"):
        load_huggingface(ms.nn.Dense(2, 2), folder)


def test_our_converted_folder_loads_too(tmp_path):
    import convert_weight

    folder = write_folder(tmp_path / "hf", V3_CONFIG, random_tensors(V3_CONFIG))
    convert_weight.convert(["--input", str(folder), "--output", str(tmp_path / "ours")])
    first, second = network_of(folder, 1), network_of(folder, 1)
    load_huggingface(first, folder)
    load_weights(second, open_source(tmp_path / "ours"))
    for one, other in zip(first.get_parameters(), second.get_parameters(), strict=True):
        assert np.array_equal(one.asnumpy(), other.asnumpy()), one.name
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match="has shape|weights that the model lacks|lacks"):
        load_weights(network_of(folder, 1), open_source(tmp_path / "ours"))
