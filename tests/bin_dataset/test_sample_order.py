"""Which samples a step reads and of which documents they are, against sets, loops and the tokens themselves."""

import numpy as np
import pytest
from helpers.command_line import ROOT, TOY
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_tools import which_documents
from mindformers_ext.bin_dataset.blended_dataset import build_datasets
from mindformers_ext.bin_dataset.gpt_dataset import GPTDatasetConfig
from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from mindformers_ext.bin_dataset.sample_order import LeftOut, Place, passages, ranges_of, samples_of_step

SIZE = 40
RANGES = st.lists(st.tuples(st.integers(0, SIZE + 5), st.integers(0, SIZE + 5)), max_size=6)


@given(RANGES)
def test_what_is_left_out(ranges: list[tuple[int, int]]) -> None:
    left_out = LeftOut(ranges, SIZE)
    gone = {place for first, end in ranges for place in range(first, end)}
    kept = [place for place in range(SIZE) if place not in gone]
    assert left_out.kept == len(kept)
    assert left_out.places(np.arange(len(kept))).tolist() == kept
    for place in range(SIZE + 1):
        assert left_out.read_before(place) == sum(other < place for other in kept)
    for read in range(len(kept) + 1):
        assert left_out.place_after(read) == (kept[read - 1] + 1 if read else 0)
    assert [place for first, end in ranges_of(np.array(kept)) for place in range(first, end)] == kept


@given(RANGES, st.integers(1, 6), st.booleans(), st.integers(0, 9), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=50)
def test_a_training_that_goes_on_reads_the_samples_of_the_unbroken_one(
    ranges: list, per_step: int, whole: bool, skipped: int, stop: int, more: int
) -> None:
    left_out = LeftOut(ranges, SIZE)
    kept = left_out.places(np.arange(left_out.kept)).tolist()
    batches = [kept[i : i + per_step] for i in range(0, len(kept), per_step)]
    batches = [batch for batch in batches if not whole or len(batch) == per_step]
    if not batches:
        return
    unbroken = [batches[(skipped + step) % len(batches)] for step in range(stop + more)]
    for step in range(1, stop + more + 1):
        assert samples_of_step(left_out, per_step, step, skipped, whole=whole).tolist() == unbroken[step - 1]
    epoch, in_pass = divmod(skipped + stop, len(batches))
    after = Place(stop, epoch, left_out.place_after(in_pass * per_step))
    for step in range(stop + 1, stop + more + 1):
        assert samples_of_step(left_out, per_step, step, 0, after, whole).tolist() == unbroken[step - 1]


def test_the_passages_hold_the_tokens(tmp_path) -> None:
    """Two files with documents of several sequences, and of none; a sample runs over their ends."""
    rng = np.random.default_rng(0)
    for name in "ab":
        with IndexedDatasetWriter(tmp_path / name, np.int32) as writer:
            for lengths in ([5], [0, 7], [3, 30, 1], [], [12], [2, 2]):
                writer.add_document(rng.integers(0, 1000, sum(lengths)), lengths)
    config = GPTDatasetConfig(random_seed=3, sequence_length=8, split="1, 0, 0", create_attention_mask=False)
    dataset = build_datasets(config, [20, None, None], ["3", str(tmp_path / "a"), "1", str(tmp_path / "b")])[0]
    files = set()
    for sample in range(20):
        found = []
        for part in passages(dataset, sample):
            files.add(part.file)
            file = IndexedDataset(part.file)
            first, end = file.document_indices[part.document : part.document + 2]
            document = np.concatenate([file.get(i) for i in range(first, end)])
            found += document[part.offset : part.offset + part.tokens].tolist()
        columns = dataset[sample]
        assert found == [*columns["input_ids"].tolist(), int(columns["labels"][-1])]
    assert len(files) == 2


def test_the_command_names_the_documents(toy_folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(toy_folder)
    options = ["--config", str(TOY / "train_toy.yaml"), "--train_dataset.data_loader.leave_out", "[[4, 9]]"]
    which_documents.report([*options, "--step", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.partition(":")[0] for line in lines} == {"sample 9", "sample 10", "sample 11", "sample 12"}
    assert all(line.partition(": ")[2].startswith("toy_text_document.bin, document ") for line in lines)
    data_parallel = ["--use_parallel", "True", "--parallel.parallel_mode", "0", "--devices", "2"]
    which_documents.report(
        [*options, *data_parallel, "--step", "1"]
    )  # two processes of 4 samples, uncounted in the YAML
    samples = {int(line.partition(":")[0].split()[1]) for line in capsys.readouterr().out.splitlines()}
    assert samples == {0, 1, 2, 3, 9, 10, 11, 12}
    with pytest.raises(ValueError, match="step 0 is not taken"):
        which_documents.report([*options, "--step", "0"])
    assert (ROOT / "dataset_tools/which_documents.py").is_file()
