"""Fine-tuning on conversations and LoRA, from the YAMLs, on top of a model that was pretrained with MTP."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import ROOT, run_command
from helpers.small_yaml import small_sizes

from mindformers_ext.sharded_checkpoint.audit import differences
from mindformers_ext.sharded_checkpoint.layout import COUNTERS
from mindformers_ext.sharded_checkpoint.reader import open_source

from .test_resume import check_same_steps, metrics

YAMLS = ROOT / "research/deepseek3/deepseek3_tiny"
TOOLS = ROOT / "dataset_tools"
LENGTH = 64
SMALL = small_sizes(LENGTH) | {
    "model.model_config.intermediate_size": 64,
    "model.model_config.vocab_size": 2048,
    "eval_dataset.data_loader.config.seq_length": LENGTH,
    "train_dataset.data_loader.sizes": "[32,0,0]",  # 8 steps of 4
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def python(folder: Path, *arguments: object) -> str:
    """Run a script, which must end well; returns what it says."""
    result = run_command([sys.executable, *map(str, arguments)], folder)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def command(config: str, *arguments: str) -> list[str]:
    """run_mindformer.py on a YAML of the tiny model, cut smaller."""
    sizes = [text for key, value in SMALL.items() for text in (f"--{key}", str(value))]
    return [str(ROOT / "run_mindformer.py"), "--config", str(YAMLS / config), *sizes, *arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Text, conversations and a tokenizer in output/sample, where the YAMLs look; a pretrained model in output."""
    folder = tmp_path_factory.mktemp("finetune")
    sample = folder / "output/sample"
    sample.mkdir(parents=True)
    text = "".join(path.read_text() for path in sorted((ROOT / "research/deepseek3").glob("*.py")))
    (sample / "corpus.txt").write_text(text)
    lines = [line.strip() for line in text.splitlines() if 20 < len(line.strip()) < 80]
    turns = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
             for a, b in zip(lines[:300], lines[1:301], strict=True)]  # fmt: skip
    (sample / "chats.jsonl").write_text("\n".join(map(json.dumps, turns)))
    tokenizer = ["--vocab-file", sample / "tokenizer.json"]
    python(folder, TOOLS / "train_tokenizer.py", "--input", sample / "corpus.txt",
           "--output", sample / "tokenizer.json", "--vocab-size", SMALL["model.model_config.vocab_size"])  # fmt: skip
    python(folder, TOOLS / "wikitext_to_bin.py", "--input", sample / "corpus.txt", *tokenizer, "--output-prefix",
           sample / "sample", "--seq-length", LENGTH, "--pad-or-stitch", "none")  # fmt: skip
    python(folder, TOOLS / "instruct_to_bin.py", "--input", sample / "chats.jsonl", *tokenizer, "--output-prefix",
           sample / "instruct", "--seq-length", LENGTH, "--pad-token", "<｜end▁of▁sentence｜>")  # fmt: skip
    python(folder, *command("pretrain_deepseek3_tiny.yaml"))
    return folder


@pytest.mark.slow
def test_fine_tuning_learns_from_conversations_and_keeps_the_balance(folder):
    """The loss falls, all weights move, MTP's too, and only the routers' biases stay (facts 4)."""
    fast = ["--lr_schedule.warmup_steps", "1", "--lr_schedule.learning_rate", "2.0e-3"]  # to learn in 8 steps
    python(folder, *command("finetune_deepseek3_tiny.yaml", *fast))
    losses = [record["loss"] for record in metrics(folder / "output_finetune")]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.2
    before, after = open_source(folder / "output/checkpoint"), open_source(folder / "output_finetune/checkpoint")
    assert np.array_equal(before.read(BIAS)[:], after.read(BIAS)[:]) and np.any(before.read(BIAS)[:])
    for name in ("model.layers.0.self_attn.o_proj.weight", "mtp.0.layer.mlp.experts.down_proj"):
        assert not np.array_equal(before.read(name)[:], after.read(name)[:]), name


@pytest.mark.slow
def test_a_stopped_lora_training_goes_on_exactly(folder):
    """From the saved adapters, moments and position, on the base that the checkpoint names; without the base, not."""
    shutil.copytree(folder / "output/checkpoint", folder / "base")
    lora = "finetune_deepseek3_debug_lora.yaml"
    python(folder, *command(lora, "--load_checkpoint", "base", "--callbacks.1.save_checkpoint_steps", "4",
                            "--callbacks.1.keep_checkpoint_max", "2"))  # fmt: skip
    whole = folder / "output_lora"
    saved = open_source(whole / "checkpoint", "step_000004")
    weights = {name for name in saved.names() if name.startswith("model.") and not name.endswith(COUNTERS)}
    assert all(name.endswith((".lora_a", ".lora_b")) for name in weights - {BIAS}) and len(weights) > 20

    again = command(lora, "--load_checkpoint", "output_lora/checkpoint", "--resume_training", "step_000004",
                    "--output_dir", "again")  # fmt: skip
    python(folder, *again)
    assert check_same_steps(folder / "again", whole) == [5, 6, 7, 8]
    assert not list(differences(*(open_source(path / "checkpoint") for path in (whole, folder / "again"))))
    adapters = [path / "adapter/adapter_model.safetensors" for path in (whole, folder / "again")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()

    (folder / "base").rename(folder / "moved")
    result = run_command([sys.executable, *again], folder)
    assert result.returncode == 2
    assert f"its adapters were trained on the weights of {folder / 'base'}" in result.stderr.strip().splitlines()[-1]
