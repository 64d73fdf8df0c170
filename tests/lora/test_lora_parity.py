"""LoRA against peft on transformers' DeepseekV3: forward, gradients, merge, and the folder both read. Float32, CPU.

Tolerances as in tests/parity: logits 1e-4 absolute, gradients 1e-3 relative; merged against base + adapter 1e-5.
"""

import json
from types import SimpleNamespace

import convert_reversed
import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.hf_reference import hf_model, load_from_hf
from helpers.small_models import v3_config
from hf_config import config_to_hf
from lora import adapter_entries, adapter_values, is_adapter, save_peft
from mindspore import Tensor
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mindformers_ext.config.model import FFN_TARGETS, LoraConfig
from mindformers_ext.errors import ConfigError

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
TARGETS = {
    "attention_dense_shared": [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "shared_experts.up_proj"],
    "every_ffn": ["gate_proj", "up_proj", "down_proj"],
    "one_of_the_experts": ["experts.down_proj", "kv_b_proj"],
}


def lora_config(targets: list[str], lora_dropout: float = 0.0, **changes):
    """A small DeepSeek-V3 with adapters of rank 4."""
    pet_config = dict(lora_rank=4, lora_alpha=8, lora_dropout=lora_dropout, target_modules=targets)
    return v3_config(pet_config=pet_config, **changes)


def adapted_reference(config) -> peft.PeftModel:
    """transformers' model with peft's adapters at the same modules, both halves random."""
    lora = config.lora
    settings = peft.LoraConfig(
        r=lora.lora_rank, lora_alpha=lora.lora_alpha, lora_dropout=0.0, target_modules=lora.pattern(), bias="none"
    )
    model = peft.get_peft_model(hf_model(config), settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def hf_names(config) -> dict[str, tuple[str, int | None]]:
    """peft's parameter name: ours and the expert in it."""
    names = {}
    for entry in adapter_entries(config):
        for i, module in enumerate(entry.modules):
            expert = i if len(entry.modules) > 1 else None
            for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                names[f"base_model.model.{module}.{theirs}.default.weight"] = f"{entry.ours}.{ours}", expert
    return names


@pytest.fixture(params=TARGETS, scope="module")
def pair(request):
    """Our network and peft's model, with the same base and the same adapters."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    config = lora_config(TARGETS[request.param])
    reference = adapted_reference(config)
    network = DeepseekV3ForCausalLM(config)
    plain = hf_model(config)  # the same seed: the reference's base
    load_from_hf(network, config, plain)
    theirs = {name: p for name, p in reference.named_parameters() if "lora_" in name}
    names = hf_names(config)
    assert theirs.keys() == names.keys()
    parameters = network.parameters_dict()
    for name, (ours, expert) in names.items():
        value = parameters[ours].asnumpy().copy()
        value[... if expert is None else expert] = theirs[name].detach().numpy()
        parameters[ours].set_data(Tensor(value))
    return config, network, reference


def tokens(config) -> np.ndarray:
    """(2, S + 1) random tokens."""
    return np.random.default_rng(3).integers(2, config.vocab_size, (2, config.seq_length + 1)).astype(np.int32)


def test_forward_and_gradients_equal_pefts(pair):
    config, network, reference = pair
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ids = tokens(config)
    logits = reference(torch.from_numpy(ids[:, :-1]).long()).logits
    network.set_train(False)
    assert np.abs(network(Tensor(ids[:, :-1])).asnumpy() - logits.detach().numpy()).max() <= 1e-4
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[:, 1:]).long().flatten())
    reference.zero_grad()
    loss.backward()

    network.set_train(True)
    trainable = network.trainable_params()
    assert all(is_adapter(p.name) for p in trainable)
    ours, gradients = ms.value_and_grad(network, None, trainable)(Tensor(ids[:, :-1]), Tensor(ids[:, 1:]))
    assert abs(ours.asnumpy() - loss.item()) <= 1e-5 * loss.item()
    by_name = {p.name: g.asnumpy() for p, g in zip(trainable, gradients, strict=True)}
    for name, (mine, expert) in hf_names(config).items():
        parameter = reference.get_parameter(name)
        expected = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        gradient = by_name[mine][... if expert is None else expert]
        assert np.linalg.norm(gradient - expected) <= 1e-3 * np.linalg.norm(expected) + 1e-9, name


def test_saved_folder_is_pefts_and_the_merged_export_is_base_plus_adapter(pair, tmp_path):
    config, network, reference = pair
    ids = torch.from_numpy(tokens(config)[:, :-1]).long()
    expected = reference(ids).logits.detach()
    save_peft(tmp_path / "adapter", config, adapter_values(network), base="base")

    again = peft.PeftModel.from_pretrained(hf_model(config), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, expected)
    assert len(load_file(tmp_path / "adapter/adapter_model.safetensors")) == len(hf_names(config))

    base = tmp_path / "base"
    base.mkdir()
    plain = hf_model(config)
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config_to_hf(config, 0, "float32")))
    convert_reversed.convert(
        ["--input", str(base), "--output", str(tmp_path / "merged"), "--hf_assets_path", str(base)]
        + ["--export_dtype", "fp32", "--merge_lora", str(tmp_path / "adapter")]
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    assert (merged(ids).logits - expected).abs().max() <= 1e-5

    theirs = reference.merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        assert (value - theirs[name]).abs().max() <= 1e-6, name


def test_training_starts_from_the_base_and_compiles():
    ms.set_context(mode=ms.GRAPH_MODE)
    config = lora_config([*ATTENTION, "mlp.up_proj", "shared_experts.up_proj"], lora_dropout=0.5)
    network, base = DeepseekV3ForCausalLM(config), DeepseekV3ForCausalLM(v3_config())
    reference = hf_model(config)
    load_from_hf(network, config, reference)
    load_from_hf(base, v3_config(), reference)
    ids = Tensor(tokens(config)[:, :-1])
    for cell in (network, base):
        cell.set_train(False)
    assert np.array_equal(network(ids).asnumpy(), base(ids).asnumpy())  # lora_b is zero

    for parameter in network.trainable_params():
        if parameter.name.endswith("lora_b"):
            parameter.set_data(Tensor(np.full(parameter.shape, 0.1, np.float32)))
    network.set_train(True)
    labels = Tensor(tokens(config)[:, 1:])
    losses = {float(network(ids, labels).asnumpy()) for _ in range(3)}
    assert len(losses) == 3  # dropout draws anew
    network.set_train(False)
    assert len({float(network(ids, labels).asnumpy()) for _ in range(2)}) == 1


BAD = {
    "router": (dict(lora_rank=4, target_modules=["gate"]), "the router is never adapted"),
    "unknown": (dict(lora_rank=4, target_modules=["wq"]), "'wq'"),
    "mindformers": (dict(pet_type="lora"), "pet_config.pet_type: unknown key"),
    "no_targets": (dict(lora_rank=4), "needs both lora_rank and target_modules"),
    "no_rank": (dict(target_modules=["q_a_proj"]), "needs both lora_rank and target_modules"),
    "absent": (dict(lora_rank=4, target_modules=["q_proj"]), "this model has no such projection"),
    "dropout": (
        dict(lora_rank=4, lora_dropout=0.1, target_modules=["experts.up_proj"]),
        "must be 0 with routed experts",
    ),
    "alpha": (dict(lora_rank=4, lora_alpha=0, target_modules=["q_a_proj"]), "must be a number above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pet_configs_are_refused(name):
    given, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        v3_config(pet_config=given)


@pytest.mark.parametrize("use_seq_parallel", [False, True])
def test_adapters_are_split_like_their_projections(monkeypatch, use_seq_parallel):
    import sharding
    from mindformers.modules.transformer import TransformerOpParallelConfig

    from mindformers_ext.layers import vocabulary

    monkeypatch.setattr(vocabulary, "create_group", lambda *_: None)
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", device_num=8)
    monkeypatch.setattr(sharding, "get_rank", lambda: 0)
    try:
        degrees = TransformerOpParallelConfig(data_parallel=2, model_parallel=4, use_seq_parallel=use_seq_parallel)
        targets = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
        network = DeepseekV3ForCausalLM(lora_config(targets, parallel_config=degrees))
        attention, tokens = network.model.layers[1].self_attn, 8 if use_seq_parallel else 2
        assert attention.q_b_proj.lora.up.in_strategy == ((2, 1), (4, 1))  # lora_b lies as the projection's rows
        assert attention.q_b_proj.add_lora.in_strategy == ((2, 4), (2, 4))
        assert attention.o_proj.lora.down.in_strategy == ((2, 4), (1, 4))  # lora_a as the projection's columns
        assert attention.o_proj.lora.up.in_strategy == ((2, 1), (1, 1))
        assert attention.o_proj.add_lora.in_strategy == ((tokens, 1), (tokens, 1))
        assert attention.q_a_proj.lora.up.in_strategy == ((tokens, 1), (1, 1))
        for part in FFN_TARGETS:  # both halves lie with their experts, as the weight does
            adapter = network.model.layers[1].mlp.experts.lora._cells[part]
            layouts = (*adapter.add.attrs["in_layout"], *adapter.add.attrs["out_layout"])
            assert [layout["alias_name"] for layout in layouts] == [("edp", "ep")] * 4
            assert [layout["tensor_map"] for layout in layouts] == [(0, -1, -1)] * 4  # numbered from the last axis
    finally:
        ms.reset_auto_parallel_context()


def test_adapters_and_mtp_are_refused_together():
    with pytest.raises(ConfigError, match="mtp_depth is 1, but must be 0 with pet_config"):
        v3_config(mtp_depth=1, pet_config=dict(lora_rank=4, target_modules=["q_a_proj"]))


def test_pattern_names_modules_as_targets_do():
    every = LoraConfig(lora_rank=1, target_modules=["up_proj"])
    shared = LoraConfig(lora_rank=1, target_modules=["shared_experts.up_proj", "o_proj"])
    for module, by_every, by_shared in (
        ("model.layers.0.mlp.up_proj", True, False),
        ("model.layers.12.mlp.shared_experts.up_proj", True, True),
        ("model.layers.3.mlp.experts.11.up_proj", True, False),
        ("model.layers.3.self_attn.o_proj", False, True),
        ("model.layers.3.mlp.gate", False, False),
        ("lm_head", False, False),
    ):
        assert (every.wants(module), shared.wants(module)) == (by_every, by_shared), module


def broken_adapter(tmp_path, config, **changes):
    """A folder of the adapter of `config`, its settings changed."""
    network = DeepseekV3ForCausalLM(config)
    save_peft(tmp_path / "adapter", config, adapter_values(network))
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path / "adapter"


BROKEN = {
    "dora": (dict(use_dora=True), "use_dora is True, which merging does not support"),
    "bias": (dict(bias="all"), "bias is 'all'"),
    "rank": (dict(r=8), r"needs A \(8, in\) and B \(out, 8\)"),
    "no_rank": (dict(r=0), "not the configuration of a LoRA adapter"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, name):
    from lora import PeftFolder

    changes, message = BROKEN[name]
    with pytest.raises(ConfigError, match=message):
        PeftFolder(broken_adapter(tmp_path, lora_config(["o_proj"]), **changes))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    from lora import MergedWeights
    from weights import name_table

    adapter = broken_adapter(tmp_path, lora_config(["o_proj"]))
    with pytest.raises(
        ConfigError, match=r"adapts model.layers.0.self_attn.o_proj of shape \(48, 48\), but .*\(48, 24\)"
    ):
        MergedWeights(SimpleNamespace(path=tmp_path), list(name_table(v3_config(v_head_dim=6))), adapter)


def test_adapters_without_their_base_are_refused(tmp_path):
    """Going on from saved adapters loads the frozen weights from where they were; routers' biases are not frozen."""
    from mindformers_ext.training.checkpoint_monitor import load_base

    network = DeepseekV3ForCausalLM(lora_config(["o_proj", "experts.up_proj"]))
    parameters = network.parameters_dict()
    with pytest.raises(ConfigError, match=r"step_4: its adapters were trained on the weights of .*gone: .*gone"):
        load_base(network, parameters, str(tmp_path / "gone"), "step_4")
    rest = set(load_base(network, parameters, "", "step_4"))  # began with random weights
    assert {name for name in rest if is_adapter(name)} == {p.name for p in network.trainable_params()}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in rest and "lm_head.weight" not in rest


def lora_checkpoint(root, base: str):
    """A checkpoint as AdapterMonitor writes it, its adapters all 0.25, and its network."""
    from mindformers_ext.sharded_checkpoint.layout import Meta
    from mindformers_ext.sharded_checkpoint.network import pieces_of
    from mindformers_ext.sharded_checkpoint.reader import open_source
    from mindformers_ext.sharded_checkpoint.writer import Saver

    network = DeepseekV3ForCausalLM(lora_config(["o_proj"]))
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(np.full(parameter.shape, 0.25, np.float32)))
    frozen = network.frozen_names()
    kept = {name: piece for name, piece in pieces_of(network).items() if name not in frozen}
    Saver(root).save(Meta(1, 1), kept, {"base": base})
    return network, open_source(root)


def test_evaluation_loads_adapters_with_their_base_or_says_what_to_do(tmp_path):
    from mindformers_ext.sharded_checkpoint.layout import Meta
    from mindformers_ext.sharded_checkpoint.network import pieces_of
    from mindformers_ext.sharded_checkpoint.writer import Saver
    from mindformers_ext.training.checkpoint_monitor import load_weights

    ms.set_context(mode=ms.PYNATIVE_MODE)
    base = DeepseekV3ForCausalLM(v3_config())
    Saver(tmp_path / "base").save(Meta(1, 1), pieces_of(base))
    _, source = lora_checkpoint(tmp_path / "adapters", str(tmp_path / "base"))
    network = DeepseekV3ForCausalLM(lora_config(["o_proj"]))
    load_weights(network, source)
    parameters = base.parameters_dict()
    for name, parameter in network.parameters_dict().items():
        if is_adapter(name):
            assert (parameter.asnumpy() == 0.25).all()
        elif name in network.frozen_names():
            assert np.array_equal(parameter.asnumpy(), parameters[name].asnumpy()), name

    with pytest.raises(
        ConfigError, match="holds LoRA adapters only; set model_config.pet_config .* or merge them first"
    ):
        load_weights(DeepseekV3ForCausalLM(v3_config()), source)
    _, rootless = lora_checkpoint(tmp_path / "rootless", "")
    with pytest.raises(ConfigError, match="were trained on random weights"):
        load_weights(network, rootless)


@pytest.mark.parametrize("base", ["hf", "ours"])
def test_the_adapter_folder_names_the_huggingface_folder_it_was_trained_on(tmp_path, base):
    """peft loads the base that base_model_name_or_path names; it could not read a checkpoint of ours."""
    from types import SimpleNamespace

    from mindformers_ext.sharded_checkpoint.layout import Meta
    from mindformers_ext.training.adapter_monitor import AdapterMonitor

    class Monitor(AdapterMonitor):
        def meta(self, cb_params, step):
            return Meta(step, 1)

    folder = tmp_path / base
    folder.mkdir()
    if base == "hf":
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")
    monitor = Monitor(directory=str(tmp_path / "checkpoint"))
    monitor.folder = tmp_path / "adapter"
    network = DeepseekV3ForCausalLM(lora_config(["o_proj"]))
    facts = {"base": str(folder)}
    monitor.save(SimpleNamespace(train_network=network, get=facts.get), 1)
    named = json.loads((monitor.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == (str(folder) if base == "hf" else "")
