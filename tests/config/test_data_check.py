"""A data section that cannot work is one sentence with file, key and value, before anything is built."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindformers_ext.bin_dataset.blended_dataset import build_datasets, plan_splits
from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDatasetWriter, loss_mask_prefix
from mindformers_ext.bin_dataset.loader_config import LoaderConfig
from mindformers_ext.config.data_check import check_data
from mindformers_ext.config.run import Run
from mindformers_ext.config.yaml_files import load_yaml
from mindformers_ext.errors import ConfigError

TINY = Path(__file__).resolve().parents[2] / "research/deepseek3/deepseek3_tiny/pretrain_deepseek3_tiny.yaml"
LENGTHS = [300, 0, 4000, 257, 9000]


def write(prefix: Path, tokens: np.ndarray, lengths: list[int] = LENGTHS, dtype: type[np.number] = np.int32) -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for part in np.split(tokens, np.cumsum(lengths)[:-1]):
            writer.add_document(part)
    return str(prefix)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 4096, sum(LENGTHS)).astype(np.int32)


@pytest.fixture
def prefix(tokens: np.ndarray, tmp_path: Path) -> str:
    return write(tmp_path / "d_text_document", tokens)


def run_of(prefix: str, loader: dict | None = None, **config: Any) -> dict:
    """The tiny YAML on the data, with changes of data_loader and its config."""
    run = copy.deepcopy(load_yaml(TINY))
    run["processor"]["tokenizer"].pop("tokenizer_file")
    section = run["train_dataset"]["data_loader"]
    section.update({"sizes": [40, 0, 0], **(loader or {})})
    section["config"].update({"data_path": ["1", prefix], **config})
    return run


def error_of(run: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        check_data(Run.of(run, "run.yaml"), "train_dataset")
    sentence = str(caught.value)
    assert sentence.startswith("run.yaml: ") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("form", ["{}", ["{}"], "1 {}", "0.3 {} 7e-1 {}", "{} {}", [1, "{}", 2.5, "{}"]])
def test_every_form_of_data_path_works(form: Any, prefix: str) -> None:
    filled = form.format(prefix, prefix) if isinstance(form, str) else [str(item).format(prefix) for item in form]
    check_data(Run.of(run_of(prefix, data_path=filled), "run.yaml"), "train_dataset")


REFUSED = {
    "weight 0": ({}, {"data_path": ["0", "P", "1", "P"]}, "the weight 0; weights must be numbers above 0"),
    "weight below 0": ({}, {"data_path": ["-1", "P", "1", "P"]}, "the weight -1; weights must be"),
    "weight NaN": ({}, {"data_path": ["nan", "P"]}, "the weight nan; weights must be"),
    "weight infinite": ({}, {"data_path": "inf P"}, "the weight inf; weights must be"),
    "weights too large": ({}, {"data_path": ["1e308", "P", "1e308", "P"]}, "sum to more than"),
    "half of the weights": ({}, {"data_path": ["1", "P", "P", "P"]}, "mixes weighted and unweighted"),
    "no data": ({}, {"data_path": []}, "config needs data_path or train_data_path"),
    "both kinds of paths": ({}, {"train_data_path": ["P"]}, "data_path and a split's own list"),
    "other split's paths": ({}, {"data_path": None, "valid_data_path": "P"}, "needs data_path or train_data_path"),
    "no eod": ({}, {"reset_position_ids": True}, "eod is not set"),
    "split without training": ({}, {"split": "0,100,0"}, "config.split '0,100,0' leaves nothing for train"),
    "split that is no number": ({}, {"split": "abc"}, "split must be one to three shares"),
    "split below 0": ({}, {"split": "98,-1,1"}, "split must be one to three shares"),
    "split as 1e-3": ({}, {"split": "1e-3"}, "split must be one to three shares"),
    "split of four": ({}, {"split": "1,1,1,1"}, "split must be one to three shares"),
    "split of nothing": ({}, {"split": ""}, "split must be one to three shares"),
    "seed": ({}, {"random_seed": 99999999999}, r"random_seed must be in [0, 2**32), got 99999999999"),
    "two seeds": ({}, {"seed": 3}, "gives random_seed twice"),
    "seed as text": ({}, {"random_seed": "x"}, "random_seed must be of type int, got 'x'"),
    "flag as text": ({}, {"eod_mask_loss": "yes"}, "eod_mask_loss must be of type bool, got 'yes'"),
    "cache of another kind": ({}, {"path_to_cache": 5}, "path_to_cache must be of type str | None, got 5"),
    "unknown key": ({}, {"sequence_lenght": 5}, "config.sequence_lenght is unknown"),
    "no sample": ({"sizes": [0, 0, 0]}, {}, "no sample of 256 tokens"),
    "more samples than are there": (
        {"sizes": [999, 0, 0]},
        {"data_path": ["P", "P"]},
        "999 samples, but the data has 104",
    ),
    "two sizes": ({"sizes": [3, 0]}, {}, "sizes must be a list of the samples"),
    "sizes below 0": ({"sizes": [-3, 0, 0]}, {}, "sizes must be a list of the samples"),
    "datasets_type": ({"datasets_type": "SFTDataset"}, {}, "datasets_type 'SFTDataset' is unknown"),
    "phase": ({"phase": "x"}, {}, "phase 'x' is unknown"),
    "phase without samples": ({"phase": "test"}, {}, "leaves nothing for test"),
    "shuffle": ({"shuffle": True}, {}, "shuffle must be False"),
    "no file": ({}, {"data_path": "P_nothing"}, "_nothing.idx does not exist"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_work_is_one_sentence(kind: str, prefix: str) -> None:
    loader, config, message = REFUSED[kind]
    path = config.get("data_path")
    if path:
        filled = path.replace("P", prefix) if isinstance(path, str) else [item.replace("P", prefix) for item in path]
        config = {**config, "data_path": filled}
    run = run_of(prefix, loader, **config)
    with pytest.raises(ConfigError) as caught:  # of the whole YAML: the eval section may share the value
        check_data(Run.of(run, "run.yaml"), "train_dataset")
    assert all(line.startswith("run.yaml: ") for line in str(caught.value).split("\n"))
    asked = {"shuffle": False, "phase": "train", **run["train_dataset"]["data_loader"]}
    with pytest.raises((ValueError, FileNotFoundError)) as caught:  # of the loader, which others than a run use
        LoaderConfig.of(**{key: asked[key] for key in ("datasets_type", "sizes", "config", "shuffle", "phase")}).count()
    assert message in str(caught.value)


def test_fewer_samples_than_a_batch(prefix: str) -> None:
    assert "gives 3 samples, but a step takes 4" in error_of(run_of(prefix, {"sizes": [3, 0, 0]}))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("place", [0, 4299, 4300, 13556])
def test_a_negative_id_is_named_wherever_it_is(place: int, dtype: type, tokens: np.ndarray, tmp_path: Path) -> None:
    tokens[place] = -5
    sentence = error_of(run_of(write(tmp_path / "bad", tokens, dtype=dtype)))
    sequence = int(np.searchsorted(np.cumsum(LENGTHS), place, side="right"))
    assert f"bad' holds token id -5 (token {place} (sequence {sequence}, document {sequence}))" in sentence


def test_an_id_outside_the_vocabulary_is_found_in_the_whole_file(tmp_path: Path) -> None:
    lengths = [1_000_000, 500_000]
    tokens = np.zeros(sum(lengths), np.uint16)
    tokens[1_400_000] = 60000
    sentence = error_of(run_of(write(tmp_path / "late", tokens, lengths, np.uint16)))
    assert "vocab_size is 4096" in sentence and "late' holds token id 60000 (token 1400000" in sentence
    assert "document 1)" in sentence


def test_an_object_store_is_believed_what_the_tools_wrote_there(prefix: str, tmp_path: Path) -> None:
    """Its ids would be read over the network; a corpus of other tools has no manifest."""
    store = pytest.importorskip("fsspec").filesystem("memory")
    for suffix in ("bin", "idx"):
        store.pipe_file(f"/check/d.{suffix}", Path(f"{prefix}.{suffix}").read_bytes())
    run = run_of("memory://check/d", s3_cache_path=str(tmp_path))
    joined = {"parts": [{"vocab_size": 4096}, None, {"parts": [{"vocab_size": 4097}]}]}
    for manifest in (None, {"vocab_size": 4096}, {"parts": [{"vocab_size": 4096}]}):
        if manifest:
            store.pipe_file("/check/d.json", json.dumps(manifest).encode())
        check_data(Run.of(copy.deepcopy(run), "run.yaml"), "train_dataset")
    for manifest in ({"vocab_size": 4097}, joined):
        store.pipe_file("/check/d.json", json.dumps(manifest).encode())
        sentence = error_of(copy.deepcopy(run))
        assert (
            "vocab_size is 4096, but" in sentence and "'memory://check/d' was made with a tokenizer of 4097" in sentence
        )


def test_tokens_of_floats(tokens: np.ndarray, tmp_path: Path) -> None:
    sentence = error_of(run_of(write(tmp_path / "f", tokens, dtype=np.float32)))
    assert "holds float32, but training samples need integer tokens" in sentence


def test_a_loss_mask_of_other_data(prefix: str) -> None:
    write(Path(loss_mask_prefix(prefix)), np.ones(30, np.uint8), [30], np.uint8)
    assert "has other lengths than" in error_of(run_of(prefix))


@pytest.mark.parametrize("data_path", [["P"], ["P", "P"], ["1", "P", "3", "P"]])
@pytest.mark.parametrize("size", [None, 0, 7, 40, 500])
@pytest.mark.parametrize("only", [0, 1])
@pytest.mark.parametrize("keep_last", [False, True])
def test_samples_are_counted_as_they_are_built(
    data_path: list[str], size: int | None, only: int, keep_last: bool, prefix: str, tmp_path: Path
) -> None:
    """`SplitPlan.count`, which the check uses, says what `build_datasets` gives or raises."""
    settings = GPTDatasetConfig(
        sequence_length=64,
        split="60,40,0",
        path_to_cache=str(tmp_path / "cache"),
        drop_last_partial_validation_sequence=not keep_last,
    )
    sizes = [size if i == only else None for i in range(3)]
    arguments = (settings, sizes, [item.replace("P", prefix) for item in data_path])

    def outcome(make) -> int | str:
        try:
            return make()
        except ValueError as error:
            return str(error)

    counted = outcome(lambda: plan_splits(*arguments, (None, None, None), only)[only].count())
    assert counted == outcome(lambda: len(build_datasets(*arguments, only=only)[only]))


def test_an_index_whose_offsets_are_wrong(prefix: str) -> None:
    path = Path(f"{prefix}.idx")
    data = bytearray(path.read_bytes())
    data[34 + 4 * len(LENGTHS) + 8] ^= 4  # the second sequence's offset
    path.unlink()
    path.write_bytes(data)
    assert "d_text_document.idx: sequence 1 starts at byte 1204, but the lengths" in error_of(run_of(prefix))
