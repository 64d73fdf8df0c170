"""Models on V3's skeleton against transformers 5: logits, loss and gradients of random checkpoints with few layers.

Tolerances as in test_huggingface.py: logits 1e-4 absolute, gradients 1e-3 of their norm.
"""

import mindspore as ms
import numpy as np
import pytest
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.transformers5 import reference
from hf_weights import HuggingFaceWeights
from mindspore import Tensor
from weights import from_huggingface, name_table

from mindformers_ext.training.checkpoint_monitor import load_weights
from mindformers_ext.training.pretrained import HuggingFaceFolder, resolve

pytestmark = pytest.mark.slow  # installs transformers 5 once


@pytest.mark.parametrize("family", ["glm4_moe_lite", "youtu"])
def test_logits_loss_and_gradients(family, tmp_path):
    folder = reference(family, tmp_path / family)
    oracle = np.load(folder / "oracle.npz")
    config = HuggingFaceWeights(folder).config
    config.compute_dtype = "float32"
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    network = DeepseekV3ForCausalLM(config).set_train(False)
    load_weights(network, resolve(HuggingFaceFolder(folder, "run.yaml"), network))
    inputs, labels = (Tensor(part.astype(np.int32)) for part in (oracle["ids"][:, :-1], oracle["ids"][:, 1:]))
    assert np.abs(network(inputs).asnumpy() - oracle["logits"]).max() <= 1e-4

    network.set_train(True)
    parameters = network.trainable_params()
    loss, gradients = ms.value_and_grad(network, None, parameters)(inputs, labels)
    assert abs(loss.asnumpy() - oracle["loss"]) <= 1e-5 * oracle["loss"]
    ours = {p.name: g.asnumpy() for p, g in zip(parameters, gradients, strict=True)}
    stacked = any("experts.gate_up_proj" in name for name in oracle.files)
    for entry in name_table(config, stacked):
        if entry.ours in ours:
            expected = from_huggingface(entry, lambda name: oracle[f"gradient.{name}"])
            error = np.linalg.norm(ours[entry.ours] - expected)
            assert error <= 1e-3 * np.linalg.norm(expected) + 1e-9, entry.ours
