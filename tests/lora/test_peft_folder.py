"""Adapters that peft wrote: merged as peft merges them, or refused with the option's name."""

import dataclasses
import json
import shutil
from pathlib import Path

import convert_reversed
import numpy as np
import peft
import pytest
import torch
from helpers.hf_reference import hf_model
from helpers.small_models import v3_config
from hf_config import config_to_hf
from peft_folder import KNOWN, NO_EFFECT, REFUSED, PeftFolder
from safetensors.torch import load_file, save_file

from mindformers_ext.errors import ConfigError

FFN, ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_b_proj", "kv_b_proj", "o_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small DeepSeek-V3 as a HuggingFace folder, float32."""
    folder, config = tmp_path_factory.mktemp("base"), v3_config()
    tensors = {name: value.contiguous() for name, value in hf_model(config).state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_hf(config, 0, "float32")))
    return folder


def write_adapter(folder: Path, **options) -> Path:
    """An adapter of random weights, written by peft."""
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **options})
    model = peft.get_peft_model(hf_model(v3_config()), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def merge(base: Path, adapter: Path, output: Path) -> dict[str, torch.Tensor]:
    """What our export holds."""
    convert_reversed.convert(
        ["--input", str(base), "--output", str(output), "--hf_assets_path", str(base)]
        + ["--export_dtype", "fp32", "--merge_lora", str(adapter)]
    )
    return {k: v for file in output.glob("*.safetensors") for k, v in load_file(file).items()}


DONE = {
    "plain": {},
    "all_linear": dict(target_modules="all-linear"),
    "rslora": dict(use_rslora=True),
    "gaussian": dict(init_lora_weights="gaussian"),
    "orthogonal": dict(init_lora_weights="orthogonal"),
    "no_start": dict(init_lora_weights=False),
    "rank_pattern": dict(rank_pattern={"o_proj": 2, r"layers\.1\.self_attn\.q_b_proj": 6}, use_rslora=True),
    "alpha_pattern": dict(alpha_pattern={"kv_b_proj": 3, r".*\.0\..*": 5}),
    "both_patterns": dict(rank_pattern={"o_proj": 2}, alpha_pattern={"^model.layers.1.self_attn.o_proj": 7}),
    "regular_expression": dict(target_modules=r"model\.layers\.[01]\.(mlp|self_attn)\.(o_proj|up_proj)"),
    "layers": dict(target_modules=ATTENTION + FFN, layers_to_transform=[1], layers_pattern="layers"),
    "one_layer": dict(layers_to_transform=0),
    "excluded": dict(target_modules=ATTENTION + FFN, exclude_modules=["o_proj", "shared_experts.up_proj"]),
    "excluded_expression": dict(target_modules=FFN, exclude_modules=r".*experts\.[0-9]+\..*"),
    "head": dict(target_modules=["lm_head", "q_a_proj"]),
}


@pytest.mark.parametrize("name", DONE)
def test_merged_as_peft_merges(base, tmp_path, name):
    adapter = write_adapter(tmp_path / "adapter", **DONE[name])
    ours = merge(base, adapter, tmp_path / "merged")
    model = peft.PeftModel.from_pretrained(hf_model(v3_config()), str(adapter))
    before = hf_model(v3_config()).state_dict()
    theirs = model.merge_and_unload().state_dict()
    assert max((theirs[key] - before[key]).abs().max() for key in before) > 0.05
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= 1e-6, key


STARTS = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "x"]
OPTIONS = {
    "dora": dict(use_dora=True),
    "qalora": dict(use_qalora=True),
    "biases": dict(bias="all"),
    "b_bias": dict(lora_bias=True),
    "whole_modules": dict(modules_to_save=["lm_head"]),
    "conv1d": dict(fan_in_fan_out=True),
    "replicated": dict(layer_replication=[[0, 2], [1, 2]]),
    "tokens": dict(trainable_token_indices=[0]),
    "parameters": dict(target_parameters=["mlp.experts.down_proj"]),
    "later_peft": dict(arrow_config={"top_k": 1}),
    "unknown": dict(use_new_thing=True),
    "unknown_off": dict(use_new_thing=False),
    "alpha_nan": dict(lora_alpha=float("nan")),
    "alpha_zero": dict(lora_alpha=0),
    "alpha_text": dict(lora_alpha="8"),
    "rank_true": dict(r=True),
    "rank_float": dict(r=4.5),
    "rank_pattern": dict(rank_pattern={"o_proj": 0}),
    "expression": dict(target_modules="("),
    "pattern": dict(alpha_pattern={"(": 4}),
    "no_targets": dict(target_modules=None),
    "other_targets": dict(target_modules=["q_b_proj", "kv_b_proj"]),
    "kind": dict(peft_type="LOHA"),
    **{start: dict(init_lora_weights=start) for start in STARTS},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A good adapter."""
    return write_adapter(tmp_path_factory.mktemp("adapter") / "plain")


def refuse(folder: Path, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PeftFolder(folder)
    assert str(folder) in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_cannot_be_done_are_named(plain, tmp_path, name):
    folder = Path(shutil.copytree(plain, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **OPTIONS[name]}))
    words = {"alpha_nan": "NaN", "expression": "'(' is not", "pattern": "'(' is not"}
    refuse(folder, words.get(name, next(iter(OPTIONS[name]))))


def test_every_option_of_peft_is_known():
    """Nothing of LoraConfig is passed over by accident; runtime_config is never saved."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"runtime_config"}
    assert fields <= {*KNOWN, *REFUSED, *NO_EFFECT}


@pytest.mark.parametrize("value", [None, -1, "x", [], {}, 1e99, True])
def test_every_value_replaced_is_read_or_refused(plain, tmp_path, value):
    folder = Path(shutil.copytree(plain, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    for key in settings:
        path.write_text(json.dumps({**settings, key: value}))
        try:
            PeftFolder(folder)
        except ConfigError as error:
            assert str(folder) in str(error)
    for content in (b"[]", b"\xff", b"{", b'{"a":' * 100_000, json.dumps(value).encode()):
        path.write_bytes(content)
        if content != b"{}":
            refuse(folder, "cannot be read" if content not in (b"[]", json.dumps(value).encode()) else "must be")


A = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
TENSORS = {
    "nan": (lambda t: t[A].view(-1)[3:4].fill_(float("nan")), "values that are not finite"),
    "infinite": (lambda t: t[A].view(-1)[-1:].fill_(float("inf")), "values that are not finite"),
    "integers": (lambda t: t.update({A: t[A].long()}), "is int64"),
    "none": (lambda t: t.clear(), "holds no tensors"),
    "half": (lambda t: t.pop(A), "needs A (4, in)"),
    "vector": (lambda t: t.update({A: t[A][0]}), "needs A (4, in)"),
    "other_name": (lambda t: t.update(x=t[A].clone()), "'x' is not of a LoRA adapter"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_no_adapter_are_named(plain, tmp_path, name):
    folder = Path(shutil.copytree(plain, tmp_path / "adapter"))
    change, words = TENSORS[name]
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    refuse(folder, words)


def test_a_stored_head_is_named(plain, tmp_path):
    """peft stores the whole head beside an adapter of it, unless it is told not to."""
    folder = Path(shutil.copytree(plain, tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {**tensors, "base_model.model.lm_head.base_layer.weight": torch.ones(2, 2)},
        folder / "adapter_model.safetensors",
    )
    refuse(folder, "save it with save_embedding_layers=False")


def test_an_adapter_that_lost_a_module_is_refused(base, plain, tmp_path):
    """peft would merge nothing there; its warning is easily missed."""
    folder = Path(shutil.copytree(plain, tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".layers.1.self_attn.o_proj." not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"names model.layers.1.self_attn.o_proj \(and 0 more\), of which"):
        merge(base, folder, tmp_path / "merged")


def test_half_precision_adapters_are_merged(base, plain, tmp_path):
    folder = Path(shutil.copytree(plain, tmp_path / "adapter"))
    tensors = {name: value.bfloat16() for name, value in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    ours = merge(base, folder, tmp_path / "merged")
    name = "model.layers.1.self_attn.o_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"].float().numpy() for half in "AB")
    expected = load_file(base / "model.safetensors")[f"{name}.weight"].numpy() + 2 * b @ a
    assert np.abs(ours[f"{name}.weight"].numpy() - expected).max() <= 1e-6
