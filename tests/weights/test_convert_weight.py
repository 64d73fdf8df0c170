"""HuggingFace to our checkpoint and back: the same bits, whatever the type, the family and the files."""

import json
import multiprocessing
import time
from functools import partial
from pathlib import Path

import convert_reversed
import convert_weight
import numpy as np
import pytest
import torch
from helpers.hf_folders import V2_LITE_CONFIG, V3_CONFIG, quantise, random_tensors, shapes, write_folder
from safetensors import safe_open
from safetensors.torch import load_file

from mindformers_ext.errors import ConfigError, exit_code_of
from mindformers_ext.files import safetensors_format as safetensors_files

NO_MTP = {**V3_CONFIG, "num_nextn_predict_layers": 0}
TIED = {**V3_CONFIG, "tie_word_embeddings": True}
TWO_DEPTHS = {**V3_CONFIG, "num_nextn_predict_layers": 2}
RELEASED = {
    **V3_CONFIG,
    **dict(hidden_size=7168, intermediate_size=18432, kv_lora_rank=512, moe_intermediate_size=2048, n_group=8),
    **dict(n_routed_experts=256, num_attention_heads=128, num_key_value_heads=128, num_experts_per_tok=8),
    **dict(num_hidden_layers=61, first_k_dense_replace=3, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64),
    **dict(topk_group=4, v_head_dim=128, vocab_size=129280, max_position_embeddings=163840),
}


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, through the safetensors package and the index."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(folder / file, "pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a dictionary)
                assert weight_map.pop(name) == file
                tensors[name] = stream.get_tensor(name)
    assert not weight_map
    return tensors


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same names, types, shapes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "config",
    [V3_CONFIG, TWO_DEPTHS, NO_MTP, TIED, V2_LITE_CONFIG],
    ids=["v3_mtp", "v3_two_mtp", "v3", "v3_tied", "v2_lite"],
)
def test_round_trip_is_bit_equal(tmp_path, config, dtype, capsys):
    tensors = random_tensors(config, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    source = write_folder(tmp_path / "hf", config, tensors)
    (source / "tokenizer.json").write_text("{}")
    convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours"), "--dtype", dtype])
    convert_reversed.convert(
        ["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "back"), "--hf_assets_path", str(source)]
        + ["--export_dtype", dtype]
    )
    same_bits(read_all(tmp_path / "back"), tensors)
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert "quantization_config" not in written and (tmp_path / "back/tokenizer.json").read_text() == "{}"
    assert written["num_nextn_predict_layers"] == config.get("num_nextn_predict_layers", 0)
    assert f"{len(tensors):,} tensors" in capsys.readouterr().out


def test_our_layout_stacks_experts_in_the_order_of_their_numbers(tmp_path):
    tensors = random_tensors(V3_CONFIG)
    source = write_folder(tmp_path / "hf", V3_CONFIG, tensors)
    convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours"), "--workers", "1"])
    ours = read_all(tmp_path / "ours")
    stack = ours["model.layers.1.mlp.experts.gate_up_proj"]
    for expert in range(12):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        assert torch.equal(stack[expert, :, :20], tensors[f"{prefix}.gate_proj.weight"].T)
        assert torch.equal(stack[expert, :, 20:], tensors[f"{prefix}.up_proj.weight"].T)
    bias = ours["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors["model.layers.1.mlp.gate.e_score_correction_bias"])


def test_fp8_blocks_are_dequantised_with_cropped_edges(tmp_path):
    config = {**V3_CONFIG, "hidden_size": 200, "moe_intermediate_size": 136, "intermediate_size": 260}
    tensors = random_tensors(config)
    expected = {}
    for name in [n for n in tensors if n.endswith("proj.weight") or n.endswith("proj_with_mqa.weight")]:
        tensors[name], tensors[f"{name}_scale_inv"], expected[name] = quantise(tensors[name])
    source = write_folder(tmp_path / "hf", config, tensors)
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        ours, back = tmp_path / f"ours_{dtype}", tmp_path / f"back_{dtype}"
        convert_weight.convert(["--input", str(source), "--output", str(ours), "--dtype", dtype])
        convert_reversed.convert(
            ["--input", str(ours), "--output", str(back), "--hf_assets_path", str(source), "--export_dtype", dtype]
        )
        exported = read_all(back)
        assert not any(name.endswith("_scale_inv") for name in exported)
        for name, values in expected.items():
            assert torch.equal(exported[name], torch.from_numpy(values).to(kind)), name


def test_stacked_experts_are_read(tmp_path):
    tensors = random_tensors(NO_MTP)
    stacked = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for part in ("gate", "up", "down"):
        names = [f"model.layers.1.mlp.experts.{e}.{part}_proj.weight" for e in range(12)]
        stacked[part] = torch.stack([tensors[name] for name in names])
    gate_up = torch.cat((stacked.pop("gate"), stacked.pop("up")), 1)
    stacked["model.layers.1.mlp.experts.gate_up_proj"] = gate_up
    stacked["model.layers.1.mlp.experts.down_proj"] = stacked.pop("down")
    for name, content in (("separate", tensors), ("stacked", stacked)):
        source = write_folder(tmp_path / name, NO_MTP, content)
        convert_weight.convert(["--input", str(source), "--output", str(tmp_path / f"ours_{name}")])
    same_bits(read_all(tmp_path / "ours_separate"), read_all(tmp_path / "ours_stacked"))


def test_names_of_the_released_model_are_audited_without_weights(tmp_path, capsys):
    """Facts 12: 46,183 tensors, 45,808 of them FP8; the names come from loops in helpers/hf_folders.py."""
    names = shapes(RELEASED)
    quantised = [n for n in names if n.endswith(("_proj.weight", "proj_with_mqa.weight")) and "eh_proj" not in n]
    index = dict.fromkeys([*names, *(f"{name}_scale_inv" for name in quantised)], "model-00001-of-000163.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    convert_weight.convert(["--input", str(tmp_path), "--only-names"])
    assert "46,183 tensors (2 of them stored copies) and 45,808 FP8 scales" in capsys.readouterr().out

    lost = "model.layers.60.mlp.experts.255.up_proj.weight"
    path.write_text(json.dumps({"weight_map": {k: v for k, v in index.items() if not k.startswith(lost)}}))
    with pytest.raises(ConfigError, match=lost):
        convert_weight.convert(["--input", str(tmp_path), "--only-names"])


def test_a_killed_conversion_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """kill -9 in the middle; finished files are kept, the others written; the result is that of one run."""
    source = write_folder(tmp_path / "hf", V3_CONFIG, random_tensors(V3_CONFIG))
    small = partial(safetensors_files.write_folder, shard_bytes=20_000)
    monkeypatch.setattr(convert_weight, "write_folder", small)

    def convert_slowly() -> None:
        write = safetensors_files.write_shard

        def slowly(*arguments):
            done = write(*arguments)
            time.sleep(0.3)
            return done

        safetensors_files.write_shard = slowly
        convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours"), "--workers", "1"])

    process = multiprocessing.get_context("fork").Process(target=convert_slowly)  # it has imported everything
    process.start()
    while len(list((tmp_path / "ours").glob("model-*.safetensors"))) < 3:
        assert process.is_alive()
        time.sleep(0.05)
    process.kill()
    process.join()
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "ours").glob("model-*.safetensors")}
    assert not (tmp_path / "ours/model.safetensors.index.json").exists()

    convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours")])
    assert f"({len(done)} were done before)" in capsys.readouterr().out
    assert all(file.stat().st_mtime_ns == at for file, at in done.items())
    convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "straight")])
    same_bits(read_all(tmp_path / "ours"), read_all(tmp_path / "straight"))

    write_folder(tmp_path / "hf", V3_CONFIG, random_tensors(V3_CONFIG, seed=1))  # another source: nothing is kept
    convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours")])
    assert "(0 were done before)" in capsys.readouterr().out


def damage(folder: Path, name: str, change) -> None:
    """Rewrite the file that holds a tensor with `change(tensors)` applied."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"][name]
    tensors = load_file(folder / file)
    change(tensors)
    from safetensors.torch import save_file

    save_file(tensors, folder / file)
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v != file} | dict.fromkeys(tensors, file)
    index.write_text(json.dumps(content))


Q_A, BIAS = "model.layers.1.self_attn.q_a_proj.weight", "model.layers.3.mlp.gate.e_score_correction_bias"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
COPY = "model.layers.2.shared_head.head.weight"
BROKEN = {
    "missing": (Q_A, lambda t: t.pop(Q_A), rf"'{Q_A}' is missing"),
    "unknown": (Q_A, lambda t: t.update(extra=torch.zeros(1)), "'extra' has no place"),
    "shape": (Q_A, lambda t: t.update({Q_A: torch.zeros(32, 47)}), r"\(32, 47\), but this model needs \(32, 48\)"),
    "fp8_without_scale": (Q_A, lambda t: t.update({Q_A: t[Q_A].to(torch.float8_e4m3fn)}), "scale .* is missing"),
    "scale_without_fp8": (Q_A, lambda t: t.update({f"{Q_A}_scale_inv": torch.ones(1, 1)}), "but has a scale"),
    "lost_weight": (Q_A, lambda t: t.update(x_scale_inv=torch.ones(1)), "scale without its weight"),
    "scale_shape": (
        Q_A,
        lambda t: t.update({Q_A: t[Q_A].to(torch.float8_e4m3fn), f"{Q_A}_scale_inv": torch.ones(1, 2)}),
        r"float32 \(1, 1\)",
    ),
    "bias": (BIAS, lambda t: t.update({BIAS: torch.full((12,), float("nan"))}), "not finite"),
    "integers": (Q_A, lambda t: t.update({Q_A: torch.zeros(32, 48, dtype=torch.int32)}), "is int32"),
    "copy": (COPY, lambda t: t.update({COPY: t[COPY] + 1}), "differs from lm_head.weight"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_source_that_does_not_fit_is_refused_by_name(tmp_path, name):
    source = write_folder(tmp_path / "hf", V3_CONFIG, random_tensors(V3_CONFIG))
    tensor, change, message = BROKEN[name]
    damage(source, tensor, change)
    with pytest.raises(ConfigError, match=message):
        convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours")])
    assert not (tmp_path / "ours").exists()


def test_damaged_files_are_refused_by_name(tmp_path):
    source = write_folder(tmp_path / "hf", V3_CONFIG, random_tensors(V3_CONFIG))
    arguments = ["--input", str(source), "--output", str(tmp_path / "ours")]
    file = source / "model-00002-of-000003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(ConfigError, match="model-00002-of-000003.safetensors: not a safetensors file.*copy it again"):
        convert_weight.convert(arguments)
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        convert_weight.convert(arguments)
    file.unlink()
    with pytest.raises(ConfigError, match="model-00002-of-000003.safetensors', which is not in the folder"):
        convert_weight.convert(arguments)
    with pytest.raises(ConfigError, match="config.json: cannot be read"):
        convert_weight.convert(["--input", str(tmp_path), "--output", str(tmp_path / "ours")])


def test_float16_that_overflows_is_refused(tmp_path):
    tensors = random_tensors(V3_CONFIG)
    tensors["model.norm.weight"][3] = 1e5
    source = write_folder(tmp_path / "hf", V3_CONFIG, tensors)
    with pytest.raises(ConfigError, match="model.norm.weight: has values that float16 cannot hold"):
        convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours"), "--dtype", "fp16"])
    assert not list((tmp_path / "ours").glob("*.index.json"))


EXPORT = {
    "other_size": ({"hidden_size": 52}, r"model.embed_tokens.weight has shape \(128, 48\), but .* needs \(128, 52\)"),
    "more_layers": ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight'.* is missing"),
    "fewer_layers": ({"num_hidden_layers": 1}, "'model.layers.1.input_layernorm.weight'.* is not of the model"),
    "more_experts": ({"n_routed_experts": 16}, r"\(12, 48\), but .* needs \(16, 48\)"),
}


@pytest.mark.parametrize("name", EXPORT)
def test_assets_of_another_model_are_refused(tmp_path, name):
    source = write_folder(tmp_path / "hf", NO_MTP, random_tensors(NO_MTP))
    convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours")])
    change, message = EXPORT[name]
    (source / "config.json").write_text(json.dumps({**NO_MTP, **change}))
    with pytest.raises(ConfigError, match=message):
        convert_reversed.convert(
            ["--input", str(tmp_path / "ours"), "--output", str(tmp_path / "out"), "--hf_assets_path", str(source)]
        )
    assert not (tmp_path / "out").exists()


def test_any_part_of_a_parameter_equals_that_part_of_the_whole(tmp_path):
    """Ranks read slices: cuts through gate and up, through experts and through FP8 blocks."""
    from hf_weights import HuggingFaceWeights

    config = {**V3_CONFIG, "hidden_size": 200, "moe_intermediate_size": 136}
    tensors = random_tensors(config)
    for name in [n for n in tensors if n.endswith("_proj.weight") and "eh_proj" not in n]:
        tensors[name], tensors[f"{name}_scale_inv"], _ = quantise(tensors[name])
    weights = HuggingFaceWeights(write_folder(tmp_path, config, tensors))
    rng = np.random.default_rng(0)
    for name in weights.names():
        whole = weights.read(name)[:]
        assert whole.shape == weights.read(name).shape and whole.dtype == weights.read(name).dtype
        for _ in range(4):
            cuts = [np.sort(rng.integers(0, size + 1, 2)) for size in whole.shape]
            part = tuple(slice(*map(int, cut)) for cut in cuts)
            assert np.array_equal(weights.read(name)[part], whole[part]), (name, part)


@pytest.mark.parametrize("options,words", [("size=200k", "No space left on device; make room ("), ("ro", "Read-only")])
def test_a_full_or_read_only_disk_is_a_sentence(tmp_path, mounted, options, words, capsys):
    out = mounted(options)
    source = write_folder(tmp_path / "hf", V3_CONFIG, random_tensors(V3_CONFIG))
    assert exit_code_of(lambda: convert_weight.convert(["--input", str(source), "--output", str(out / "ours")])) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {out}/ours") and words in error
    convert_weight.convert(["--input", str(source), "--output", str(tmp_path / "ours")])
    back = ["--input", str(tmp_path / "ours"), "--output", str(out / "back"), "--hf_assets_path", str(source)]
    assert exit_code_of(lambda: convert_reversed.convert(back)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {out}/back") and words in error
