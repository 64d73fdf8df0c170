"""Our datasets against the installed megatron-core 0.16.1: indices, blends and samples are equal, bit for bit."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindformers_ext.bin_dataset.blended_dataset import BlendedDataset, build_datasets
from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig

RNG = np.random.default_rng(5)
MANY_SHORT = RNG.integers(1, 80, 900).tolist()
FEW_LONG = [100_000, 1, 37, 5_000, 2, 512] * 4
ONES = [1] * 700
WITH_EMPTY = [0, 5, 0, 0, 64, 1, 0, 200, 33, 0] * 12

# name: corpora, prefixes and weights (None: unweighted), config, sizes of train, valid, test
CASES = {
    "one_epoch": ([MANY_SHORT], None, {"split": "1,0,0", "sequence_length": 64}, [300, 0, 0]),
    "whole_epoch": ([MANY_SHORT], None, {"split": "1,0,0", "sequence_length": 64}, [None, None, None]),
    "two_epochs_last_shuffled_in": ([MANY_SHORT], None, {"split": "1,0,0", "sequence_length": 32}, [2200, 0, 0]),
    "three_epochs_last_apart": ([MANY_SHORT], None, {"split": "1,0,0", "sequence_length": 32}, [2500, 0, 0]),
    "long_documents": ([FEW_LONG], None, {"split": "1,0,0", "sequence_length": 128}, [9000, 0, 0]),
    "one_token_documents": ([ONES], None, {"split": "1,0,0", "sequence_length": 16}, [100, 0, 0]),
    "empty_documents": ([WITH_EMPTY], None, {"split": "1,0,0", "sequence_length": 50}, [150, 0, 0]),
    "sample_longer_than_epoch": ([[3, 4, 5]], None, {"split": "1,0,0", "sequence_length": 100}, [20, 0, 0]),
    "splits": ([MANY_SHORT], None, {"split": "90, 8, 2", "sequence_length": 64}, [300, 40, 10]),
    "keep_last_validation_sequence": (
        [MANY_SHORT],
        None,
        {"split": "60,40,0", "sequence_length": 64, "drop_last_partial_validation_sequence": False},
        [300, None, 0],
    ),
    "no_extra_token": (
        [MANY_SHORT],
        None,
        {"split": "1,0,0", "sequence_length": 64, "add_extra_token_to_sequence": False},
        [1200, 0, 0],
    ),
    "seed": ([MANY_SHORT], None, {"split": "1,0,0", "sequence_length": 64, "random_seed": 99}, [300, 0, 0]),
    "single_weighted": ([MANY_SHORT], [1.0], {"split": "1,0,0", "sequence_length": 64}, [400, 0, 0]),
    "blend_of_three": (
        [MANY_SHORT, FEW_LONG, WITH_EMPTY],
        [0.3, 0.5, 0.2],
        {"split": "80,15,5", "sequence_length": 64},
        [4000, 200, 20],
    ),
    "blend_by_size": ([MANY_SHORT, WITH_EMPTY, ONES], None, {"split": "1,0,0", "sequence_length": 16}, [500, 0, 0]),
    "blend_exhaustive": (
        [MANY_SHORT, WITH_EMPTY, ONES],
        None,
        {"split": "70,20,10", "sequence_length": 16},
        [None] * 3,
    ),
}


def both(case, corpus, megatron_build, cache, **config):
    """(megatron's datasets, ours) of a case."""
    lengths, weights, settings_, sizes = CASES[case]
    prefixes = [corpus(f"part{i}", part, seed=i) for i, part in enumerate(lengths)]
    settings_ = {**settings_, **config}
    theirs = megatron_build(sizes, blend=(prefixes, weights), **settings_)
    mixed = prefixes if weights is None else [item for pair in zip(weights, prefixes, strict=True) for item in pair]
    ours = build_datasets(GPTDatasetConfig(path_to_cache=str(cache), eod=7, **settings_), sizes, mixed)
    return theirs, ours


def assert_same_indices(theirs, ours):
    if isinstance(ours, BlendedDataset):
        np.testing.assert_array_equal(theirs.dataset_index, ours.dataset_index)
        np.testing.assert_array_equal(theirs.dataset_sample_index, ours.dataset_sample_index)
        for part, our_part in zip(theirs.datasets, ours.datasets, strict=True):
            assert_same_indices(part, our_part)
        return
    for name in ("document_index", "sample_index", "shuffle_index"):
        expected, got = getattr(theirs, name), getattr(ours, name)
        assert expected.dtype == got.dtype, name
        np.testing.assert_array_equal(expected, got, err_msg=name)


def assert_same_sample(theirs, ours):
    pairs = (
        ("tokens", "input_ids"),
        ("labels", "labels"),
        ("loss_mask", "loss_mask"),
        ("position_ids", "position_ids"),
    )
    for name, our_name in pairs:
        np.testing.assert_array_equal(theirs[name].numpy(), ours[our_name], err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_indices_and_1000_samples_equal(case, corpus, megatron_build, tmp_path):
    theirs, ours = both(case, corpus, megatron_build, tmp_path / "cache")
    for expected, got in zip(theirs, ours, strict=True):
        assert (expected is None) == (got is None)
        if got is None:
            continue
        assert len(expected) == len(got)
        assert_same_indices(expected, got)
        if len(got) == 0:
            continue
        chosen = np.random.default_rng(0).integers(0, len(got), 1000)
        batch = got.batch(chosen)
        for row, index in enumerate(chosen):
            assert_same_sample(expected[int(index)], {name: column[row] for name, column in batch.items()})


@pytest.mark.parametrize("pad", [-1, 3, 7])
@pytest.mark.parametrize("case", ["one_epoch", "keep_last_validation_sequence", "no_extra_token", "empty_documents"])
def test_masks_and_positions_equal(case, pad, corpus, megatron_build, tmp_path):
    masks = {
        "reset_position_ids": True,
        "reset_attention_mask": True,
        "eod_mask_loss": True,
        "create_attention_mask": True,
    }
    lengths, _, settings_, sizes = CASES[case]
    prefix = corpus("part", lengths[0])
    theirs = megatron_build(sizes, pad=pad, blend=([prefix], None), **settings_, **masks)
    config = GPTDatasetConfig(path_to_cache=str(tmp_path / "cache"), eod=7, pad=pad, **settings_, **masks)
    for expected, got in zip(theirs, build_datasets(config, sizes, [prefix]), strict=True):
        for index in range(0 if got is None else len(got)):
            if index % 53 == 0 or index == len(got) - 1:
                assert_same_sample(expected[index], got[index])
                np.testing.assert_array_equal(expected[index]["attention_mask"].numpy(), got[index]["attention_mask"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40) | st.just(1), min_size=1, max_size=60).filter(any),
    sequence_length=st.integers(1, 70),
    samples=st.none() | st.integers(0, 120),
    seed=st.integers(0, 2**32 - 1),
    extra=st.booleans(),
    split=st.sampled_from(["1,0,0", "7,2,1", "1,1,1", "0,1,0"]),
)
def test_random_corpora(
    lengths, sequence_length, samples, seed, extra, split, corpus, megatron_build, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("random")
    prefix = corpus(folder.name, lengths, seed=seed % 97)
    config = {
        "sequence_length": sequence_length,
        "random_seed": seed,
        "split": split,
        "add_extra_token_to_sequence": extra,
    }
    sizes = [samples] * 3
    for name in range(3):
        # Splits without a token make megatron-core loop for ever; ours names them.
        ours = _build_one(prefix, GPTDatasetConfig(path_to_cache=str(folder), eod=7, **config), sizes, name)
        if ours is None:
            return
    theirs = megatron_build(sizes, blend=([prefix], None), path_to_cache=str(folder / "megatron"), **config)
    ours = build_datasets(GPTDatasetConfig(path_to_cache=str(folder), eod=7, **config), sizes, [prefix])
    for expected, got in zip(theirs, ours, strict=True):
        if got is not None:
            assert_same_indices(expected, got)
            for index in range(min(20, len(got))):
                assert_same_sample(expected[index], got[index])


def _build_one(prefix, config, sizes, only):
    try:
        return build_datasets(config, sizes, [prefix], only=only)
    except ValueError as error:
        assert "has no tokens" in str(error)
        return None
