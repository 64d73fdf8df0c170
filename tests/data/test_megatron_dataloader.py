"""The registered loader: from the YAML through MindFormers' dataset, sharded, broadcast, resumed."""

import subprocess
import sys

import numpy as np
import pytest
import yaml
from mindformers.dataset import build_dataset
from mindformers.dataset.blended_datasets import gpt_dataset as upstream
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindspore.dataset import GeneratorDataset

from mindformers_ext.bin_dataset.blended_dataset import build_datasets
from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig, sample_columns
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, IndexedDatasetWriter, loss_mask_prefix
from mindformers_ext.bin_dataset.sample_order import LeftOut
from mindformers_ext.data import BlendedMegatronDatasetDataLoader
from mindformers_ext.data.data_position import DataPosition, position_of
from mindformers_ext.data.megatron_dataloader import SampleSource

YAML = """
train_dataset_task:
  type: CausalLanguageModelDataset
  dataset_config:
    data_loader:
      type: BlendedMegatronDatasetDataLoader
      datasets_type: "GPTDataset"
      sizes: [40, 0, 0]
      config:
        random_seed: 1234
        seq_length: 32
        split: "1, 0, 0"
        reset_position_ids: False
        reset_attention_mask: False
        eod_mask_loss: False
        num_dataset_builder_threads: 1
        create_attention_mask: False
        data_path: ['1', "{prefix}"]
      shuffle: False
    input_columns: ["input_ids", "labels", "loss_mask", "position_ids"]
    construct_args_key: ["input_ids", "labels"]
    num_parallel_workers: 1
    drop_remainder: True
    batch_size: 4
    repeat: 1
    prefetch_size: 1
"""


def rows(dataset):
    return list(dataset.create_tuple_iterator(output_numpy=True, num_epochs=1))


def load(prefix, sizes=(40, 0, 0), columns=("input_ids", "labels"), loader=None, **config):
    settings = {"seq_length": 32, "data_path": ["1", prefix], **config}
    return BlendedMegatronDatasetDataLoader(
        "GPTDataset", list(sizes), settings, column_names=list(columns), **(loader or {})
    )


@pytest.fixture
def prefix(corpus):
    return corpus("c", [20, 100, 3, 77] * 10)


def test_yaml_gives_the_samples_of_our_dataset(prefix):
    registered = MindFormerRegister.get_cls(MindFormerModuleType.DATASET_LOADER, "BlendedMegatronDatasetDataLoader")
    assert registered is BlendedMegatronDatasetDataLoader
    config = MindFormerConfig(**yaml.safe_load(YAML.format(prefix=prefix)))
    batches = rows(build_dataset(config.train_dataset_task))
    assert len(batches) == 10
    expected = build_datasets(GPTDatasetConfig(sequence_length=32), [40, 0, 0], ["1", prefix])[0].batch(np.arange(40))
    for column, name in enumerate(("input_ids", "labels", "loss_mask", "position_ids")):
        got = np.concatenate([batch[column] for batch in batches])
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, expected[name])


def test_shards_are_disjoint_and_whole(prefix):
    everything = [row[0] for row in rows(load(prefix))]
    for shards in (2, 4):
        parts = [rows(load(prefix, loader={"num_shards": shards, "shard_id": i})) for i in range(shards)]
        for index, sample in enumerate(everything):
            np.testing.assert_array_equal(parts[index % shards][index // shards][0], sample)


@pytest.mark.parametrize("read_ahead", [1, 1000, 1 << 20])
@pytest.mark.parametrize("stride", [1, 3])
def test_rows_read_ahead_are_those_asked_for(read_ahead, stride, prefix, monkeypatch):
    dataset = build_datasets(GPTDatasetConfig(sequence_length=32), [40, None, None], ["1", prefix], only=0)[0]
    monkeypatch.setattr(SampleSource, "READ_AHEAD", read_ahead)
    source = SampleSource(dataset, ["input_ids", "labels"], 2, LeftOut([], 40), stride)
    for index in [*range(0, 38, stride), *range(1, 38, stride), 37, 0, 5, 6, 4, 36, 1]:
        for name, column in zip(("input_ids", "labels"), source[index], strict=True):
            np.testing.assert_array_equal(column, dataset[2 + index][name])


@pytest.mark.parametrize("consumed", [0, 1, 12, 39])
def test_first_sample_is_the_same_with_other_shards(consumed, prefix):
    everything = [row[0] for row in rows(load(prefix))]
    options = {"first_sample": consumed}
    rest = [row[0] for row in rows(load(prefix, loader=options))]
    np.testing.assert_array_equal(rest, everything[consumed:])
    half = rows(load(prefix, loader={**options, "num_shards": 2, "shard_id": 0}))
    np.testing.assert_array_equal(half[0][0], everything[consumed])


def test_skipping_steps_as_mindformers_does_equals_the_position(prefix):
    everything = rows(load(prefix).batch(4))
    resumed = load(prefix).batch(4)
    resumed.set_init_step(3)
    np.testing.assert_array_equal([row[0] for row in rows(resumed)], [row[0] for row in everything[3:]])


def test_position_knows_its_data(prefix):
    first = position_of(load(prefix).batch(4).take(3), 5)
    assert first == position_of(load(prefix, columns=("labels",)).batch(2), 5)
    dataset = build_datasets(GPTDatasetConfig(sequence_length=32), [40, None, None], ["1", prefix], only=0)[0]
    assert first == DataPosition.of(dataset, 5)
    assert first.data_hash != position_of(load(prefix, seed=4321), 5).data_hash
    assert position_of(GeneratorDataset([(1,)], ["a"]).batch(1), 5) is None


def test_left_out_samples_are_not_read(prefix):
    everything = [row[0] for row in rows(load(prefix))]
    kept = [everything[place] for place in range(40) if place not in (0, 1, 7, 8, 9, 39)]
    loader = {"leave_out": [[7, 10], [0, 2], [39, 50]]}
    np.testing.assert_array_equal([row[0] for row in rows(load(prefix, loader=loader))], kept)
    half = rows(load(prefix, loader={**loader, "first_sample": 3, "num_shards": 2, "shard_id": 1}))
    np.testing.assert_array_equal([row[0] for row in half][:10], kept[4::2][:10])


@pytest.mark.parametrize("first", [-1, 40])
def test_first_sample_beyond_the_data(first, prefix):
    with pytest.raises(ValueError, match=f"first_sample is {first}"):
        load(prefix, loader={"first_sample": first})


def test_eod_columns_equal_mindformers(prefix):
    flags = {"reset_position_ids": True, "eod_mask_loss": True, "create_attention_mask": True}
    config = GPTDatasetConfig(
        sequence_length=32, eod=7, reset_attention_mask=True, create_compressed_eod_mask=True, eod_pad_length=8, **flags
    )
    text = np.random.default_rng(3).integers(0, 1000, (200, 33)).astype(np.int32)
    text[np.random.default_rng(4).random(text.shape) < 0.06] = 7
    columns = sample_columns(text.copy(), config)
    for row in range(len(text)):
        tokens = text[row, :-1].astype(np.int64)
        attention, loss, positions = upstream._get_ltor_masks_and_position_ids(tokens, 7, True, True, True, True)
        np.testing.assert_array_equal(columns["attention_mask"][row], attention)
        np.testing.assert_array_equal(columns["loss_mask"][row], loss)
        np.testing.assert_array_equal(columns["position_ids"][row], positions)
        np.testing.assert_array_equal(columns["actual_seq_len"][row], upstream._get_eod_attention_mask(tokens, 7, 8))


def test_more_eods_than_eod_pad_length(prefix):
    config = GPTDatasetConfig(sequence_length=8, eod=7, create_compressed_eod_mask=True, eod_pad_length=2)
    with pytest.raises(ValueError, match="has 7 eod tokens, but eod_pad_length is 2"):
        sample_columns(np.full((1, 9), 7, np.int32), config)


def test_stored_loss_mask_masks_the_labels(prefix):
    tokens = IndexedDataset(prefix)
    learnt = (tokens.tokens % 3 == 0).astype(np.uint8)
    with IndexedDatasetWriter(loss_mask_prefix(prefix), np.uint8) as writer:
        writer.add_batch(learnt, tokens.sequence_lengths, np.ones(len(tokens), np.int64))
    for labels, mask in rows(load(prefix, columns=("labels", "loss_mask"))):
        np.testing.assert_array_equal(mask, labels % 3 == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_lenght": 5}, "config.sequence_lenght is unknown"),
        ({"seed": 1, "random_seed": 2}, "gives random_seed twice"),
        ({"seq_length": 0}, "sequence_length must be an integer of at least 1"),
        ({"data_path": ["1", "/nowhere/data"]}, "/nowhere/data.idx does not exist"),
        ({"data_path": None}, "needs data_path or train_data_path"),
        ({"split": "0, 1, 0"}, "leaves nothing for train"),
        ({"reset_position_ids": True}, "eod is not set"),
    ],
)
def test_bad_yaml_is_one_sentence(change, message, prefix):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(prefix, **change)


def test_other_bad_arguments(prefix):
    with pytest.raises(ValueError, match="asks for \\['actual_seq_len'\\]"):
        load(prefix, columns=("input_ids", "actual_seq_len"))
    with pytest.raises(ValueError, match="shuffle must be False"):
        load(prefix, loader={"shuffle": True})
    with pytest.raises(ValueError, match="asks for 9999 samples, but the data has"):
        load(prefix, sizes=(9999, 0, 0), data_path=[prefix, prefix, prefix])
    with pytest.raises(ValueError, match="no sample of 100000 tokens"):
        load(prefix, sizes=(None, 0, 0), seq_length=100_000, data_path=[prefix, prefix, prefix])


STAGES, DP, TP = 4, 2, 2
LEVELS = (0, 1, 2, 3)


def reads_files(level, rank):
    """MindSpore's meaning of dataset_broadcast_opt_level: 1 spares the stages between first and last, which take no
    input, 2 all but one rank of those in a stage that hold the same samples, 3 both, 0 none."""
    stage, _, tp_rank = np.unravel_index(rank, (STAGES, DP, TP))
    spared_by_stage = 0 < stage < STAGES - 1
    return not (level in (1, 3) and spared_by_stage) and not (level in (2, 3) and tp_rank > 0)


def test_broadcast_levels(prefix):
    code = f"""
import os
import mindspore as ms
from mindformers.core.context import build_context, set_context
from mindformers_ext.data import megatron_dataloader as loader
build_context({{"use_parallel": False, "context": {{"device_target": "CPU"}}}})
ms.set_auto_parallel_context(pipeline_stages={STAGES}, dataset_strategy=(({DP}, 1), ({DP}, 1)))
os.environ["RANK_SIZE"] = "{STAGES * DP * TP}"
config = {{"seq_length": 32, "data_path": ["1", {prefix!r}]}}
for level in {LEVELS}:
    set_context(dataset_broadcast_opt_level=level)
    for rank in range({STAGES * DP * TP}):
        os.environ["RANK_ID"] = str(rank)
        data = loader.BlendedMegatronDatasetDataLoader("GPTDataset", [40, 0, 0], config, ["input_ids", "labels"])
        real = isinstance(data.source, loader.SampleSource)
        print("RANK", level, rank, real, len(data.source), *(column.shape[0] for column in data.source[0]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    got = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RANK")]
    ranks = [(level, rank) for level in LEVELS for rank in range(STAGES * DP * TP)]
    expected = [f"{level} {rank} {reads_files(level, rank)} 40 32 32".split() for level, rank in ranks]
    assert got == expected, done.stderr[-2000:]
    assert [sum(reads_files(level, rank) for rank in range(16)) for level in LEVELS] == [16, 8, 8, 4]
