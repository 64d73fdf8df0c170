"""scripts/compare_hf.py and make_hf_assets.py: our training's YAML to a folder that transformers runs as we do."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import convert_reversed
import convert_weight
import numpy as np
import pytest
import torch
import yaml
from helpers.hf_folders import random_tensors, write_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from mindformers_ext.bin_dataset.chat_template import DEEPSEEK_TOKENS, DEEPSEEK_V3, NEEDED, ChatTemplate
from mindformers_ext.config.run import read_run
from mindformers_ext.errors import ConfigError

BOS, EOS, USER, ASSISTANT = NEEDED
ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"


def script(name: str):
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A HuggingFace folder of the tiny model's sizes, its assets made from the YAML, and the same weights as ours."""
    root = tmp_path_factory.mktemp("compare")
    words = [BOS, EOS, USER, ASSISTANT, *(chr(97 + i) for i in range(26)), " "]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(root / "tokenizer.json"))
    arguments = ["--config", str(TINY), "--tokenizer_file", str(root / "tokenizer.json"), "--output"]
    script("make_hf_assets").run([*arguments, str(root / "assets")])
    config = json.loads((root / "assets/config.json").read_text())
    tensors = random_tensors(config)
    tensors |= {name: t.abs() for name, t in tensors.items() if name.endswith("correction_bias")}
    write_folder(root / "source", config, tensors)
    convert_weight.convert(["--input", str(root / "source"), "--output", str(root / "ours")])
    convert_reversed.convert(
        ["--input", str(root / "ours"), "--output", str(root / "hf"), "--hf_assets_path", str(root / "assets")]
    )
    return root


def test_our_checkpoint_and_its_export_are_the_same_model(folder, capsys):
    arguments = ["--hf_dir", str(folder / "hf"), "--prompts", "the quick brown fox"]
    assert script("compare_hf").run([*arguments, "--tokens", "3", "--checkpoint", str(folder / "ours")])
    assert script("compare_hf").run([*arguments, "--tokens", "0", "--checkpoint", str(folder / "hf")])
    lines = [line for line in capsys.readouterr().out.splitlines() if "logits differ" in line]
    assert len(lines) == 2
    for line in lines:
        difference, kl = (float(line.rpartition(word)[2].split()[0].rstrip(",")) for word in ("at most", "KL"))
        assert difference <= 1e-4 and abs(kl) <= 1e-6


def test_a_folder_without_a_tokenizer_is_compared_on_random_tokens(folder, tmp_path, capsys):
    bare = Path(shutil.copytree(folder / "hf", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    arguments = ["--hf_dir", str(bare), "--checkpoint", str(folder / "ours"), "--tokens", "1", "--prompts", "abc"]
    assert script("compare_hf").run(arguments)
    assert "bare has no tokenizer: 24 random token ids stand for each prompt" in capsys.readouterr().out


@pytest.mark.slow
def test_another_checkpoint_is_told_apart(folder, tmp_path):
    config = json.loads((folder / "assets/config.json").read_text())
    other = write_folder(tmp_path, config, random_tensors(config, seed=1))
    arguments = ["--hf_dir", str(folder / "hf"), "--prompts", "abc", "--tokens", "3", "--checkpoint", str(other)]
    assert not script("compare_hf").run(arguments)


def test_numbers_of_compare_are_the_formulas():
    compare = script("compare_hf").compare
    rng = np.random.default_rng(0)
    theirs, ours = rng.normal(size=(2, 3, 5)).astype(np.float32)
    p, q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (theirs, ours))
    difference, kl = compare(theirs, ours)
    assert difference == np.abs(theirs - ours).max()
    assert kl == pytest.approx(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item() / 3)


def test_missing_transformers_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="transformers is missing: pip install"):
        script("compare_hf").import_reference()


def test_chat_template_is_that_of_the_training_data(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    messages = [("system", "be brief"), ("user", "what is it"), ("assistant", "a list"), ("user", "sure")]
    chat = [{"role": role, "content": text} for role, text in messages]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    trained = ChatTemplate(DEEPSEEK_V3, DEEPSEEK_TOKENS).render(chat, [False] * len(chat)).text
    assert rendered == trained + ASSISTANT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_yaml_sections_come_back(folder, tmp_path):
    script("make_hf_assets").run(["--hf_dir", str(folder / "hf"), "--output", str(tmp_path / "model.yaml")])
    sections = yaml.safe_load((tmp_path / "model.yaml").read_text())
    tiny, model = read_run(TINY), sections["model"]["model_config"]
    for key, value in sections["moe_config"].items():
        assert getattr(tiny.model.moe_config, key) == value, key
    for key in ("type", "auto_register"):
        assert tiny.value(f"model.model_config.{key}") == model.pop(key)
    for key, value in model.items():
        if key != "initializer_range":
            assert getattr(tiny.model, key) == value, key


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="give --config and --tokenizer_file, or --hf_dir"):
        script("make_hf_assets").run(["--output", str(tmp_path)])
    with pytest.raises(ConfigError, match="x.json does not exist"):
        script("make_hf_assets").run(["--config", str(TINY), "--tokenizer_file", "x.json", "--output", str(tmp_path)])
