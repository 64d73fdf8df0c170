"""config.json and files of models on V3's skeleton: their words, four-bit experts, names around a language model."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.hf_folders import V3_CONFIG, random_tensors
from helpers.siblings import GLM, KIMI, KIMI_0905, MOONLIGHT, V3_1, YOUTU
from hf_config import compare, config_from_hf, corrected, read_config, sections_from_hf
from hf_weights import HuggingFaceWeights
from safetensors.numpy import save_file

from mindformers_ext.config.run import read_run
from mindformers_ext.errors import ConfigError

RUNS = Path(__file__).parents[2] / "research" / "deepseek3"

PLAIN = {k: v for k, v in V3_CONFIG.items() if k not in ("quantization_config", "rope_scaling")}
PLAIN |= {"num_nextn_predict_layers": 0, "torch_dtype": "float32"}


def test_the_released_families_become_sections():
    moonlight, kimi, glm, youtu = map(sections_from_hf, (MOONLIGHT, KIMI, GLM, YOUTU))
    assert moonlight["model"]["model_config"]["rms_norm_eps"] == 1e-5
    assert kimi["moe_config"]["expert_num"] == 384 and kimi["model"]["model_config"]["extend_method"] == "YARN"
    assert (glm["moe_config"]["first_k_dense_replace"], glm["model"]["model_config"]["theta"]) == (1, 1e6)
    assert (glm["model"]["model_config"]["eos_token_id"], glm["moe_config"]["use_gating_sigmoid"]) == (154820, True)
    assert youtu["moe_config"]["expert_num"] == 1 and youtu["model"]["model_config"]["tie_word_embeddings"]
    for values, depth in ((MOONLIGHT, 0), (KIMI, 0), (GLM, 1), (YOUTU, 0)):
        assert config_from_hf(values, depth).model_type == "deepseekv3"


@pytest.mark.parametrize(
    ("run", "released"),
    [
        ("moonlight_16b/pretrain_moonlight_16b", MOONLIGHT),
        ("moonlight_16b/finetune_moonlight_16b_lora", MOONLIGHT),
        ("kimi_k2/pretrain_kimi_k2", {**KIMI, "rope_scaling": None}),  # from scratch without YaRN
        ("kimi_k2/finetune_kimi_k2_lora", KIMI),
        ("deepseek3_671b/finetune_deepseek3_671b", V3_1),
    ],
)
def test_shipped_runs_are_the_released_models(run, released):
    model = read_run(RUNS / f"{run}.yaml").model
    compare(model, {**released, "num_nextn_predict_layers": model.mtp_depth}, "config.json")


def test_a_later_kimi_extends_positions_further():
    values = sections_from_hf(KIMI_0905)["model"]["model_config"]
    assert values["scaling_factor"]["factor"] == 64.0
    assert config_from_hf(KIMI_0905, 0).max_position_embeddings == 262144


def test_exports_name_a_class_that_programs_know():
    assert corrected(KIMI, 0, "bfloat16")["model_type"] == "deepseek_v3"
    glm = corrected(GLM, 1, "bfloat16")
    assert (glm["architectures"], glm["mlp_layer_types"]) == (["Glm4MoeLiteForCausalLM"], GLM["mlp_layer_types"])
    assert "n_routed_experts" not in corrected(YOUTU, 0, "bfloat16")


@pytest.mark.parametrize(
    "kinds", [["sparse", "dense", "sparse"], ["dense"], "dense", [1, 2, 3], ["dense", "sparse", "other"]], ids=str
)
def test_layers_in_another_order_are_refused(kinds):
    with pytest.raises(ConfigError, match="mlp_layer_types is .* must be 'dense' for the first layers"):
        sections_from_hf({**GLM, "num_hidden_layers": 3, "mlp_layer_types": kinds})


WEIGHTS = {
    **{"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, "dynamic": False},
    **{"actorder": None, "observer": "minmax", "observer_kwargs": {}, "block_structure": None},
}


def compressed(**changes) -> dict:
    """quantization_config of four-bit experts."""
    group = {"targets": ["Linear"], "input_activations": None, "weights": WEIGHTS | changes}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


def packed(weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A matrix in groups of 32 columns as compressed-tensors writes it, by loops; and what the files then hold."""
    rows, columns = weight.shape
    scale = np.zeros((rows, -(-columns // 32)), ml_dtypes.bfloat16)
    words, right = np.zeros((rows, -(-columns // 8)), np.uint32), np.zeros((rows, columns), np.float32)
    for row in range(rows):
        for group in range(scale.shape[1]):
            part = weight[row, 32 * group : 32 * group + 32]
            scale[row, group] = max(np.abs(part).max() / 7, 1e-4)
        for column in range(columns):
            step = float(scale[row, column // 32])
            number = int(np.clip(round(float(weight[row, column]) / step), -8, 7))
            words[row, column // 8] |= np.uint32((number + 8) << (4 * (column % 8)))
            right[row, column] = number * step
    files = {"weight_packed": words.view(np.int32), "weight_scale": scale, "weight_shape": np.array(weight.shape)}
    return files, right


def write(folder, values: dict, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def tensors():
    """Of a small plain V3."""
    return {name: tensor.float().numpy() for name, tensor in random_tensors(PLAIN).items()}


def test_four_bit_experts_inside_a_model_that_reads_images(tmp_path, tensors):
    right, files = dict(tensors), {"vision_tower.patch_embed.weight": np.zeros((2, 2), np.float32)}
    for name, tensor in tensors.items():
        if ".mlp.experts." in name:
            parts, right[name] = packed(tensor)
            files |= {f"language_model.{name.removesuffix('weight')}{key}": part for key, part in parts.items()}
        else:
            files[f"language_model.{name}"] = tensor
    values = {"model_type": "kimi_k25", "text_config": {**PLAIN, "model_type": "kimi_k2"}, "vision_config": {}}
    write(tmp_path / "four", values | {"quantization_config": compressed()}, files)
    write(tmp_path / "plain", PLAIN, right)
    four, plain = HuggingFaceWeights(tmp_path / "four"), HuggingFaceWeights(tmp_path / "plain")
    assert "1 of images left out" in str(four.audit) and "INT4" in str(four.audit)
    for name in plain.names():
        np.testing.assert_array_equal(four.read(name)[...], plain.read(name)[...], err_msg=name)
        if plain.read(name).shape[0] > 3:  # a part that starts and ends inside a word and a group
            np.testing.assert_array_equal(four.read(name)[1:3], plain.read(name)[1:3], err_msg=name)
    assert read_config(tmp_path / "four")["model_type"] == "kimi_k2"


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_shape"])
def test_four_bit_experts_without_a_part_are_refused(tmp_path, tensors, suffix):
    name = "model.layers.1.mlp.experts.3.up_proj."
    parts, _ = packed(tensors.pop(f"{name}weight"))
    files = tensors | {name + key: part for key, part in parts.items() if key != suffix}
    write(tmp_path / "m", PLAIN | {"quantization_config": compressed()}, files)
    with pytest.raises(ConfigError, match=f"weight_packed is INT4, but .*{suffix} is missing"):
        HuggingFaceWeights(tmp_path / "m")


@pytest.mark.parametrize(
    "changes", [{"num_bits": 8}, {"group_size": 64}, {"symmetric": False}, {"actorder": "group"}, {"new": 1}], ids=str
)
def test_other_compressions_are_refused(changes):
    with pytest.raises(ConfigError, match=rf"config_groups.group_0.weights.{next(iter(changes))}"):
        sections_from_hf({**PLAIN, "quantization_config": compressed(**changes)})
