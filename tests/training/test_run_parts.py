"""Small parts of the run: device peak, metrics file, text generation, corpus and tokenizer tools."""

import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from mindformers.core.context.build_context import _MSContextApplier

from dataset_tools.make_sample_corpus import reference_articles, to_wikitext
from dataset_tools.train_tokenizer import train
from dataset_tools.unigram_entropy import unigram_entropy
from mindformers_ext.bin_dataset.text_sources import is_heading
from mindformers_ext.training import run_modes
from mindformers_ext.training.device_peak import ASCEND_910B_TFLOPS, device_peak
from mindformers_ext.training.metrics import keep_lines_until, plot, whole_records
from mindformers_ext.training.text_generation import generate, pick_token


def test_device_peak() -> None:
    assert device_peak("Ascend") == (ASCEND_910B_TFLOPS, "Ascend 910B, dense bfloat16")
    assert device_peak("Ascend", 313) == (313.0, "given as device_peak_tflops")
    measured, source = device_peak("CPU")
    assert 1e-4 < measured < 100 and "measured" in source


def test_a_resumed_run_rewrites_the_steps_after_its_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 10)) + '{"step": 10, "lo')
    keep_lines_until(path, 6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    keep_lines_until(path, 0)
    assert path.read_text() == ""


def test_lines_that_are_no_records_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b"[]", b"{}", b"null", b'{"step": "x"}', b'{"step": null}', b"\xff\xfe", b"[" * 100_000, b""]
    path.write_bytes(b"\n".join([b'{"step": 1}', *lines, b'{"step": 2}', b'{"step": 3, "lo']))
    keep_lines_until(path, 6)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_lines_without_losses_are_neither_summed_up_nor_drawn(tmp_path: Path) -> None:
    """Of a run that resumes over them; they stay in the file."""
    whole = dict.fromkeys(("loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm"), 1.0) | {"expert_load": {}}
    lines = [{"step": 1}, {"step": 2} | whole, {"step": 3, "loss": 1.0}, {"step": 4} | whole]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["step"] for record in whole_records(path)] == [2, 4]
    plot(whole_records(path), {}, tmp_path / "p.png")


def test_plot_without_mtp_and_experts(tmp_path: Path) -> None:
    record = {"step": 1, "loss": 2.0, "main_loss": 2.0, "mtp_loss": None, "expert_load": {}}
    plot([record, record | {"step": 2, "loss": 1.5}], {}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000 and len(list(tmp_path.iterdir())) == 1


def test_generation_stops_at_the_end_token_the_limit_and_the_context() -> None:
    def next_is_one_more(tokens: np.ndarray) -> np.ndarray:
        return np.eye(12, dtype=np.float32)[(tokens + 1) % 12]

    arguments = {"seq_length": 8, "choose": pick_token}
    assert generate(next_is_one_more, [2], eos_token_id=6, max_new_tokens=50, **arguments) == [3, 4, 5]
    assert generate(next_is_one_more, [2], eos_token_id=0, max_new_tokens=2, **arguments) == [3, 4]
    assert generate(next_is_one_more, [1, 2], eos_token_id=0, max_new_tokens=50, **arguments) == [3, 4, 5, 6, 7, 8]


def test_sampling_follows_temperature_top_k_and_top_p() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rng = np.random.default_rng(0)

    def shares(**options) -> np.ndarray:
        picks = [pick_token(logits, rng, **options) for _ in range(4000)]
        return np.bincount(picks, minlength=4) / 4000

    assert pick_token(logits) == 0
    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.01), [1, 0, 0, 0], atol=0)
    cold = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(temperature=0.5), cold / cold.sum(), atol=0.03)


def test_sample_corpus_is_wikitext() -> None:
    articles = reference_articles()
    text = to_wikitext(articles)
    lines = text.splitlines()
    assert sum(is_heading(line.encode()) for line in lines) == len(articles) > 70
    assert len(text) > 400_000
    words = sum(len(body.split()) for body in articles.values())
    assert len(text.split()) == words + sum(2 + len(title.split()) for title in articles)  # nothing is lost


def test_tokenizer_is_deterministic_and_lossless(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(to_wikitext(dict(list(reference_articles().items())[:8])), encoding="utf-8")
    first, second = train([str(corpus)], 600), train([str(corpus)], 600)
    assert first.to_str() == second.to_str() and first.get_vocab_size() == 600
    assert first.token_to_id("<｜begin▁of▁sentence｜>") == 0 and first.token_to_id("<｜end▁of▁sentence｜>") == 1
    for text in ("The assert statement", "naïve 😀\n\ttab", "日本語 x"):
        assert first.decode(first.encode(text).ids) == text


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([3, 3, 7, 7])) == pytest.approx(math.log(2))
    assert unigram_entropy(np.array([5, 5])) == 0
    shares = np.array([0.5, 0.25, 0.25])
    assert unigram_entropy(np.array([0, 0, 1, 2])) == pytest.approx(-(shares * np.log(shares)).sum())


def test_the_context_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mindformers_ext.training.register  # noqa: F401

    def set_context(ascend_config: dict) -> None:
        read.append(json.loads(Path(ascend_config["parallel_speed_up_json_path"]).read_text()))

    read = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("mindspore.context.set_context", set_context)
    _MSContextApplier()._apply_set_context_remaining({"dataset_broadcast_opt_level": 3})
    assert read == [{"dataset_broadcast_opt_level": 3}]
    assert list(tmp_path.iterdir()) == []


def test_no_more_data_workers_than_cores():
    """The YAMLs of the large models ask for 8; MindSpore refuses more than the machine has."""
    config = {"train_dataset": {"num_parallel_workers": 10**6}, "eval_dataset": {"num_parallel_workers": 1}}
    run_modes.limit_workers(config)
    assert config["train_dataset"]["num_parallel_workers"] == os.cpu_count()
    assert config["eval_dataset"]["num_parallel_workers"] == 1
