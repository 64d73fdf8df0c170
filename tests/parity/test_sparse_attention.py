"""DeepSeek-V3.2 against torch: logits, the model's loss and the indexers', and every gradient, in both stages.

Tolerances as in test_huggingface.py. transformers 5's own model is compared in test_siblings.py.
"""

import convert_reversed
import convert_weight
import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek3_model import DeepseekV3ForCausalLM
from deepseek32_config import DeepseekV32Config
from deepseek32_model import DeepseekV32ForCausalLM
from helpers.hf_folders import V3_CONFIG, random_tensors, write_folder
from helpers.hf_reference import gradients_as_hf, load_from_hf
from helpers.small_models import SIZES, v3_config, v32_config
from helpers.sparse_reference import indexer_loss, v32_model
from hf_weights import HuggingFaceWeights
from mindspore import Tensor
from safetensors.torch import load_file

from mindformers_ext.errors import ConfigError
from mindformers_ext.training.checkpoint_monitor import weights_of
from mindformers_ext.training.metrics import take_loss_parts

V32_CONFIG = {key: value for key, value in V3_CONFIG.items() if key != "quantization_config"} | {
    **{"model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"]},
    **{"index_n_heads": 4, "index_head_dim": 12, "index_topk": 8},
}


def compare(config, mode, monkeypatch):
    ms.set_context(mode=mode)
    network, reference = DeepseekV32ForCausalLM(config), v32_model(config, monkeypatch)
    load_from_hf(network, config, reference)
    ids = np.random.default_rng(7).integers(2, config.vocab_size, (2, config.seq_length + 1)).astype(np.int32)
    inputs, labels = ids[:, :-1], ids[:, 1:]
    theirs = reference(torch.from_numpy(inputs).long()).logits
    main = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), torch.from_numpy(labels).long().flatten())
    extra = indexer_loss(reference)
    (main + config.indexer_loss_factor * extra).backward()

    assert np.abs(network.set_train(False)(Tensor(inputs)).asnumpy() - theirs.detach().numpy()).max() <= 1e-4
    network.set_train(True)
    parameters = network.trainable_params()
    loss, gradients = ms.value_and_grad(network, None, parameters)(Tensor(inputs), Tensor(labels))
    assert loss.asnumpy() == pytest.approx((main + config.indexer_loss_factor * extra).item(), rel=1e-5)
    ours_main, _, _, ours_extra = take_loss_parts(network)
    assert ours_main == pytest.approx(main.item(), rel=1e-5)
    assert ours_extra == pytest.approx(config.indexer_loss_factor * extra.item(), rel=1e-4)
    ours = gradients_as_hf(config, {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)})
    expected = {name: p.grad for name, p in reference.named_parameters()}
    if config.sparse_attention == "warm_up":
        expected = {name: gradient for name, gradient in expected.items() if ".indexer." in name}
        assert len(ours) == 5 * config.num_layers
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        gradient = np.zeros(ours[name].shape) if gradient is None else gradient.numpy()
        assert np.linalg.norm(ours[name] - gradient) <= 1e-3 * np.linalg.norm(gradient) + 1e-8, name


STAGES = {
    "warm_up": v32_config(sparse_attention="warm_up"),
    "sparse": v32_config(indexer_loss_factor=0.5),
    "short": v32_config(index_topk=24),  # every key is selected
}


@pytest.mark.parametrize("name", STAGES)
def test_losses_and_gradients(name, monkeypatch):
    compare(STAGES[name], ms.PYNATIVE_MODE, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_compiled(name, monkeypatch):
    compare(STAGES[name], ms.GRAPH_MODE, monkeypatch)


def test_no_more_keys_than_selected_is_v3_exactly():
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = v32_config(index_topk=24)
    sparse, dense = DeepseekV32ForCausalLM(config).set_train(False), DeepseekV3ForCausalLM(v3_config()).set_train(False)
    for name, parameter in dense.parameters_dict().items():
        if name != "loss_parts":
            parameter.set_data(sparse.parameters_dict()[name].value())
    ids = Tensor(np.random.default_rng(2).integers(2, 128, (2, 24)).astype(np.int32))
    assert np.array_equal(sparse(ids).asnumpy(), dense(ids).asnumpy())


def test_weights_both_ways(tmp_path):
    tensors = random_tensors(V32_CONFIG, torch.float32)
    rank, hidden, heads, width = 32, 48, 4, 12
    for layer in range(3):
        indexer = f"model.layers.{layer}.self_attn.indexer"
        for name, shape in (
            ("wq_b.weight", (heads * width, rank)),
            ("wk.weight", (width, hidden)),
            ("k_norm.weight", (width,)),
            ("k_norm.bias", (width,)),
            ("weights_proj.weight", (heads, hidden)),
        ):
            tensors[f"{indexer}.{name}"] = torch.randn(shape)
    write_folder(tmp_path / "hf", V32_CONFIG, tensors)
    convert_weight.convert(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "ours"), "--dtype", "fp32"])
    convert_reversed.convert(
        ["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--export_dtype", "fp32"]
        + ["--hf_assets_path", str(tmp_path / "hf")]
    )
    back = {key: x for file in (tmp_path / "back").glob("*.safetensors") for key, x in load_file(file).items()}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_the_warm_up_starts_from_a_v3(tmp_path):
    values = {key: value for key, value in V3_CONFIG.items() if key != "quantization_config"}
    write_folder(tmp_path, values, random_tensors(values, torch.float32))
    plain = HuggingFaceWeights(tmp_path).config
    same = {key: getattr(plain, key) for key in (*SIZES, "scaling_factor", "extend_method", "max_position_embeddings")}
    same["scaling_factor"] = vars(plain.scaling_factor)
    same |= dict(moe_config=plain.moe_config, index_n_heads=4, index_head_dim=12, index_topk=8)
    network = DeepseekV32ForCausalLM(DeepseekV32Config(**same, sparse_attention="warm_up"))
    source = network.huggingface_weights(tmp_path)
    parameters = network.parameters_dict()
    loaded = weights_of(network, source, parameters)
    assert set(source.names()) <= loaded.keys()
    assert not any(".indexer." in name for name in loaded)
    trained = {parameter.name for parameter in network.trainable_params()}
    assert trained and trained == {name for name in parameters if ".indexer." in name}
    with pytest.raises(ConfigError, match=r"indexer.* is missing"):
        HuggingFaceWeights(tmp_path, DeepseekV32Config(**same))
