"""Values that are not finite, files of another time and files that are needed: refused or done, with the names."""

import json
from functools import partial
from pathlib import Path

import convert_reversed
import convert_weight
import numpy as np
import pytest
import torch
from helpers.hf_folders import V3_CONFIG, quantise, random_tensors, write_folder
from safetensors.torch import load_file, save_file

from mindformers_ext.errors import ConfigError
from mindformers_ext.files import safetensors_format
from mindformers_ext.sharded_checkpoint.layout import Meta, Piece
from mindformers_ext.sharded_checkpoint.reader import open_source
from mindformers_ext.sharded_checkpoint.shards import Slot
from mindformers_ext.sharded_checkpoint.writer import Saver

NO_MTP = {**V3_CONFIG, "num_nextn_predict_layers": 0}
EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"
NAN, INF = float("nan"), float("inf")


def convert(source: Path, output: Path, *options: str) -> None:
    convert_weight.convert(["--input", str(source), "--output", str(output), *options])


def export(source: Path, output: Path, assets: Path, *options: str) -> None:
    convert_reversed.convert(
        ["--input", str(source), "--output", str(output), "--hf_assets_path", str(assets), *options]
    )


def file_of(folder: Path, name: str) -> str:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
@pytest.mark.parametrize(
    "name,value",
    [(EXPERT, NAN), ("model.layers.0.self_attn.kv_b_proj.weight", INF), ("lm_head.weight", -INF)]
    + [("model.norm.weight", NAN), ("model.layers.2.eh_proj.weight", NAN)],
)
def test_a_value_that_is_not_finite_is_found(tmp_path, name, value, dtype):
    """The last value of any tensor, whatever it is converted to; the tensor and its file are named."""
    tensors = random_tensors(V3_CONFIG)
    tensors[name].view(-1)[-1] = value
    for copy in ("embed_tokens.weight", "shared_head.head.weight"):
        tensors.pop(f"model.layers.2.{copy}")
    source = write_folder(tmp_path / "hf", V3_CONFIG, tensors)
    with pytest.raises(ConfigError, match=f"{file_of(source, name)}: {name} has values that are not finite"):
        convert(source, tmp_path / "ours", "--dtype", dtype)
    assert not list((tmp_path / "ours").glob("*.index.json"))


@pytest.mark.parametrize("part", ["weight", "scale"])
def test_fp8_that_is_not_finite_is_found(tmp_path, part):
    tensors = random_tensors(NO_MTP)
    weight, scale, _ = quantise(tensors[EXPERT])
    if part == "weight":
        weight.view(torch.uint8).view(-1)[5] = 0x7F
    else:
        scale[0, 0] = INF
    tensors[EXPERT], tensors[f"{EXPERT}_scale_inv"] = weight, scale
    source = write_folder(tmp_path / "hf", NO_MTP, tensors)
    wrong = EXPERT if part == "weight" else f"{EXPERT}_scale_inv"
    with pytest.raises(ConfigError, match=f"{file_of(source, wrong)}: {wrong} has values that are not finite"):
        convert(source, tmp_path / "ours")


def test_experts_of_several_types_are_converted(tmp_path):
    """Some in FP8, some in bfloat16, one in float32, as mixed quantization leaves them."""
    tensors = random_tensors(NO_MTP)
    down = [f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in range(12)]
    expected = {name: tensors[name].float() for name in down}
    tensors[down[3]], tensors[f"{down[3]}_scale_inv"], values = quantise(tensors[down[3]])
    expected[down[3]] = torch.from_numpy(values)
    tensors[down[5]] = expected[down[5]] = expected[down[5]] + 1e-5
    convert(write_folder(tmp_path / "hf", NO_MTP, tensors), tmp_path / "ours", "--dtype", "fp32")
    stack = load_file(tmp_path / "ours/model-00001-of-00001.safetensors")["model.layers.1.mlp.experts.down_proj"]
    for i, name in enumerate(down):
        assert torch.equal(stack[i].T, expected[name]), name


def test_float32_beyond_bfloat16_is_told_apart(tmp_path):
    tensors = random_tensors(NO_MTP, torch.float32)
    tensors["model.norm.weight"][3] = 3.4e38
    source = write_folder(tmp_path / "hf", NO_MTP, tensors)
    with pytest.raises(ConfigError, match="model.norm.weight: has values that bfloat16 cannot hold; choose fp32"):
        convert(source, tmp_path / "ours")


@pytest.fixture
def good(tmp_path) -> Path:
    """A HuggingFace folder in `hf` and its conversion in `ours`."""
    write_folder(tmp_path / "hf", NO_MTP, random_tensors(NO_MTP))
    convert(tmp_path / "hf", tmp_path / "ours", "--dtype", "fp32")
    return tmp_path


@pytest.mark.parametrize("kind", ["files", "checkpoint"])
def test_exports_find_values_that_are_not_finite(good, kind):
    """In a converted folder, and in a part of a parameter that a rank of a training saved."""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    if kind == "files":
        (file,) = (good / "ours").glob("*.safetensors")
        tensors = load_file(file)
        tensors[name][11, 3, 4] = NAN
        save_file(tensors, file)
    else:
        source = open_source(good / "ours")
        values = {key: np.array(source.read(key)[...]) for key in source.names()}
        values[name][11, 3, 4] = NAN
        for rank in (1, 0):
            pieces = {}
            for key, value in values.items():
                half, rest = value.shape[0] // 2, value.shape[1:]
                rows = (half * rank, half * (rank + 1))
                pieces[key] = Piece(value[slice(*rows)], Slot(value.shape, (rows, *((0, size) for size in rest))))
            Saver(good / "saved", rank, 2).save(Meta(1, 2), pieces)
    folder, file = {"files": ("ours", "model-00001-of-00001"), "checkpoint": ("saved", "rank_0001")}[kind]
    with pytest.raises(ConfigError, match=f"{file}.safetensors: {name} has values that are not finite"):
        export(good / folder, good / "out", good / "hf")


def test_a_damaged_checkpoint_is_not_exported(good):
    source = open_source(good / "ours")
    pieces = {key: Piece(source.read(key)[...], Slot.whole(source.read(key).shape)) for key in source.names()}
    Saver(good / "saved").save(Meta(1, 1), pieces)
    with open(good / "saved/step_000001/rank_0000.safetensors", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x01")
    with pytest.raises(ConfigError, match="damaged: .* in rank_0000.safetensors"):
        export(good / "saved", good / "out", good / "hf")


def save_some(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / name, metadata={"format": "pt"})


def move_in_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    here = content["weight_map"]["lm_head.weight"]
    content["weight_map"]["lm_head.weight"] = next(file for file in files if file != here)
    index.write_text(json.dumps(content))


NORM = {"model.norm.weight": torch.ones(48)}
STALE = {
    "whole_beside_index": (
        lambda folder: save_some(folder, "model.safetensors", random_tensors(NO_MTP, seed=1)),
        "is in model.safetensors and in model-0000.-of-000003.safetensors, which model.safetensors.index.json names",
    ),
    "another_beside_index": (lambda folder: save_some(folder, "z.safetensors", NORM), "'model.norm.weight' is in z"),
    "two_without_index": (
        lambda folder: [
            *(file.unlink() for file in folder.glob("model*")),
            save_some(folder, "model.safetensors", random_tensors(NO_MTP)),
            save_some(folder, "z_ema.safetensors", NORM),
        ],
        "'model.norm.weight' is in model.safetensors and in z_ema.safetensors",
    ),
    "parts_without_index": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        "holds model-00001-of-000003.safetensors, a part of several, but not model.safetensors.index.json",
    ),
    "index_of_another_time": (move_in_index, "tensor 'lm_head.weight' is not in its file"),
}


@pytest.mark.parametrize("name", STALE)
def test_files_of_another_time_are_refused(good, name):
    change, message = STALE[name]
    change(good / "hf")
    with pytest.raises(ConfigError, match=message):
        convert(good / "hf", good / "again")


def test_what_has_other_names_may_lie_beside(good):
    save_some(good / "hf", "adapter_model.safetensors", {"base_model.model.x.lora_A.weight": torch.ones(2, 2)})
    convert(good / "hf", good / "again")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_weights_of_others_are_not_written_over(good, name):
    save_some(good, name, NORM)
    before = {path.name: path.read_bytes() for path in good.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match=f"holds {name}, which was not written here"):
        export(good / "ours", good, good / "hf")
    with pytest.raises(ConfigError, match=f"holds {name}, which was not written here"):
        convert(good / "hf", good)
    assert before == {path.name: path.read_bytes() for path in good.iterdir() if path.is_file()}
    with pytest.raises(ConfigError, match="is the input; give another folder"):
        convert(good / "hf", good / "hf")


def test_a_new_export_leaves_nothing_of_the_old(good, monkeypatch):
    """Into the folder of an earlier one with more files; transformers then reads the new weights."""
    small = partial(safetensors_format.write_folder, shard_bytes=40_000)
    for module in (convert_reversed, convert_weight):
        monkeypatch.setattr(module, "write_folder", small)
    export(good / "ours", good / "out", good / "hf", "--export_dtype", "fp32")
    convert(good / "hf", good / "ours")
    assert len(list((good / "out").glob("*.safetensors"))) > len(list((good / "ours").glob("*.safetensors"))) > 1
    other = random_tensors(NO_MTP, seed=1)
    write_folder(good / "hf", NO_MTP, other)
    convert(good / "hf", good / "ours")
    export(good / "ours", good / "out", good / "hf")
    index = json.loads((good / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert {file.name for file in (good / "out").glob("*.safetensors")} == set(index.values())
    written = {k: v for file in (good / "out").glob("*.safetensors") for k, v in load_file(file).items()}
    assert all(torch.equal(written[name], value) for name, value in other.items())


def test_an_export_that_stops_leaves_no_folder_that_can_be_read(good, monkeypatch):
    """New files among old ones under the old index would be a mixture of two models."""
    monkeypatch.setattr(convert_reversed, "write_folder", partial(safetensors_format.write_folder, shard_bytes=40_000))
    export(good / "ours", good / "out", good / "hf")
    write_folder(good / "hf", NO_MTP, random_tensors(NO_MTP, seed=1))
    convert(good / "hf", good / "ours")
    write, done = safetensors_format.write_shard, []

    def stop_at_third(*arguments):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(write(*arguments))
        return done[-1]

    monkeypatch.setattr(safetensors_format, "write_shard", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        export(good / "ours", good / "out", good / "hf")
    with pytest.raises(ConfigError, match="the download or conversion was not finished"):
        convert(good / "out", good / "again")


def test_stale_rotary_tables_are_left_out_and_counted(good, capsys):
    """As Moonlight's released files have them, of any length; nothing else unknown passes."""
    tensors = random_tensors(NO_MTP)
    stale = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3 + i) for i in range(2)}
    source = write_folder(good / "stale", NO_MTP, {**tensors, **stale, "model.rotary_emb.inv_freq": torch.ones(4)})
    convert(source, good / "again", "--dtype", "fp32")
    convert(source, good / "again", "--only-names")
    assert capsys.readouterr().out.count("3 stale rotary_emb.inv_freq left out") == 2
    ours, again = (load_file(good / name / "model-00001-of-00001.safetensors") for name in ("ours", "again"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    for name in ("model.layers.0.self_attn.rotary_emb.cos_cached", "model.layers.0.mlp.rotary_emb.inv_freq"):
        write_folder(good / "unknown", NO_MTP, {**tensors, name: torch.ones(4)})
        with pytest.raises(ConfigError, match=f"'{name}' has no place"):
            convert(good / "unknown", good / "out")


TOKENIZER = """
from transformers import PreTrainedTokenizer
from .tokens_of_it import TOKENS
class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tiktoken.model"}
    def __init__(self, vocab_file, **options):
        self.lines = open(vocab_file).read().splitlines()
        super().__init__(**options)
    def get_vocab(self): return {line: i for i, line in enumerate(self.lines)}
    @property
    def vocab_size(self): return len(self.lines)
    def _tokenize(self, text): return list(text)
    def _convert_token_to_id(self, token): return self.lines.index(token)
    def _convert_id_to_token(self, index): return self.lines[index]
"""


def test_a_tokenizer_with_its_own_code_is_exported_whole(good):
    """Its vocabulary, its module by any name, and what that imports: transformers loads the exported folder."""
    from transformers import AutoTokenizer

    assets = good / "hf"
    auto_map = {"AutoTokenizer": ["own_tokens.OwnTokenizer", None]}
    (assets / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "OwnTokenizer"}))
    (assets / "tiktoken.model").write_text("a\nb\nc")
    (assets / "own_tokens.py").write_text(TOKENIZER)
    (assets / "tokens_of_it.py").write_text("TOKENS = 3\n")
    (assets / "modeling_own.py").write_text("")
    export(good / "ours", good / "out", assets)
    assert AutoTokenizer.from_pretrained(good / "out", trust_remote_code=True).encode("cab") == [2, 0, 1]
    assert not (good / "out/modeling_own.py").exists()  # the weights run in transformers' own class
    (assets / "own_tokens.py").unlink()
    with pytest.raises(ConfigError, match="auto_map names own_tokens.py, which is not in the folder"):
        export(good / "ours", good / "out", assets)
