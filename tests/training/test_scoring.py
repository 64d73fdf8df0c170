"""run_mode score: packed log-probabilities equal transformers' of each completion alone."""

import json
import sys

import mindspore as ms
import numpy as np
import pytest
import torch
from deepseek3_model import DeepseekV3ForCausalLM
from helpers.command_line import ROOT, run_command
from helpers.hf_folders import random_tensors, write_folder
from helpers.hf_reference import hf_model, load_from_hf
from helpers.small_models import v3_config
from helpers.small_yaml import small_sizes
from hf_config import config_to_hf
from mindformers.core.context.validators import validate_mf_ctx_run_mode
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mindformers_ext.config.run import read_run
from mindformers_ext.errors import ConfigError
from mindformers_ext.training.run_modes import forward_logits, mindformers_settings
from mindformers_ext.training.scoring import Line, packed, read_lines, scores, write_scores

LENGTH, ROWS = 24, 2


def letters() -> Tokenizer:
    """One token a letter, and one that every text begins with."""
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0} | {chr(97 + i): i + 2 for i in range(26)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $0", special_tokens=[("<s>", 0)])
    return tokenizer


def some_lines(count: int) -> list[Line]:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 11, (count, 2))
    return [Line({"id": i}, *(rng.integers(0, 128, size).tolist() for size in pair)) for i, pair in enumerate(sizes)]


def test_log_probabilities_equal_transformers():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    config = v3_config(seq_length=LENGTH)
    reference = hf_model(config).eval()
    network = DeepseekV3ForCausalLM(config).set_train(False)
    load_from_hf(network, config, reference)
    lines = some_lines(9)
    assert any(len(row) > 1 for batch in packed(lines, ROWS, LENGTH) for row in batch)
    found = list(scores(lambda *inputs: forward_logits(network, *inputs), lines, ROWS, LENGTH))
    assert [line.content["id"] for line, _ in found] == list(range(9))
    for line, logprobs in found:
        with torch.no_grad():
            logits = reference(torch.tensor([line.tokens])).logits[0].log_softmax(-1)
        expected = [logits[len(line.prompt) - 1 + i, token].item() for i, token in enumerate(line.completion)]
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_packing_keeps_the_order_and_the_room():
    lines = some_lines(50)
    batches = list(packed(lines, ROWS, LENGTH))
    assert [line for batch in batches for row in batch for line in row] == lines
    assert all(sum(len(line.tokens) for line in row) <= LENGTH for batch in batches for row in batch)
    assert all(len(batch) == ROWS for batch in batches[:-1])
    assert list(packed([], ROWS, LENGTH)) == []


def test_texts_and_ids(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "ab", "completion": "c", "more": 1}\n\n{"prompt_ids": [5], "completion_ids": [6, 7]}\n')
    first, second = read_lines(path, letters(), 128, LENGTH)
    assert (first.prompt, first.completion) == ([0, 2, 3], [4])  # only a prompt begins a text
    assert (second.prompt, second.completion) == ([5], [6, 7])
    count = write_scores([(first, np.array([-0.5])), (second, np.array([-1.0, -2.0]))], tmp_path / "out.jsonl")
    assert count == (2, 3, -3.5)
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert out[0] == {"prompt": "ab", "completion": "c", "more": 1} | {
        "completion_ids": [4],
        "token_logprobs": [-0.5],
        "logprob": -0.5,
    }
    assert out[1]["logprob"] == -3.0


@pytest.mark.parametrize(
    "text,words",
    [
        ("{", "line 1: is not JSON"),
        ('{"prompt": "a"}', "line 1: needs the texts prompt and completion"),
        ('{"prompt_ids": [1], "completion_ids": ["a"]}', "must be lists of token ids"),
        ('{"prompt_ids": [1], "completion_ids": []}', "must have a token each"),
        ('{"prompt_ids": [1], "completion_ids": [128]}', "token id 128 is not below vocab_size 128"),
        ('{"prompt_ids": [1], "completion_ids": [2, 2, 2, 2, 2, 2, 2, 2]}', "has 9 tokens, but"),
        ("[1]", "needs the texts"),
    ],
)
def test_lines_that_cannot_be_scored(text, words, tmp_path):
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=words):
        list(read_lines(tmp_path / "in.jsonl", letters(), 128, 8))
    (tmp_path / "texts.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(ConfigError, match="which need processor.tokenizer.tokenizer_file"):
        list(read_lines(tmp_path / "texts.jsonl", None, 128, 8))


@pytest.mark.parametrize("mode", ["train", "finetune", "eval", "predict", "score", "compile"])
def test_mindformers_takes_every_run_mode(mode):
    run = read_run(
        ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml", overrides=[("run_mode", mode)]
    )
    validate_mf_ctx_run_mode(mindformers_settings(run))


@pytest.mark.slow
def test_the_command(tmp_path):
    """run_mindformer.py --run_mode score of a HuggingFace folder, several completions in a row."""
    tiny = ROOT / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
    sizes = small_sizes(LENGTH) | {"model.model_config.mtp_depth": 0}
    config = config_to_hf(read_run(tiny, overrides=sizes.items()).model, 0, "float32")
    write_folder(tmp_path / "hf", config, random_tensors(config, torch.float32))
    lines = [{"prompt_ids": line.prompt, "completion_ids": line.completion} for line in some_lines(9)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def scored(rows: int) -> list[dict]:
        command = [sys.executable, str(ROOT / "run_mindformer.py"), "--config", str(tiny), "--run_mode", "score"]
        command += ["--load_checkpoint", str(tmp_path / "hf"), "--input_data", "in.jsonl", "--batch_size", str(rows)]
        command += [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
        done = run_command([*command, "--processor", "null", "--output_dir", f"out{rows}"], tmp_path)
        assert done.returncode == 0 and "9 completions" in done.stdout, done.stderr[-3000:]
        return [json.loads(line) for line in (tmp_path / f"out{rows}/scores.jsonl").read_text().splitlines()]

    one, four = scored(1), scored(4)
    for line, first, second in zip(lines, one, four, strict=True):
        assert first | line == first and len(first["token_logprobs"]) == len(line["completion_ids"])
        np.testing.assert_allclose(first["token_logprobs"], second["token_logprobs"], atol=1e-5)
        assert first["logprob"] == pytest.approx(sum(first["token_logprobs"]), abs=1e-5)
