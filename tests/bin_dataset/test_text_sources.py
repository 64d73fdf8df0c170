"""Reading text: formats, partitions, and input that is broken."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindformers_ext.bin_dataset import text_sources
from mindformers_ext.bin_dataset.text_sources import (
    BadInputError,
    Span,
    clean_wikitext,
    find_inputs,
    is_heading,
    plan_partitions,
    read_documents,
    read_text_lines,
    read_wikitext,
)


def whole(path):
    return Span(str(path), 0, Path(path).stat().st_size)


def documents(path, read=read_documents, key="text", **options):
    return [text for batch in read(whole(path), [key], **options) for text in batch.texts[key]]


def lines(texts):
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def test_formats_give_the_same_documents(tmp_path, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = lines(texts)
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    half = len(data) // 2
    frames = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        assert documents(tmp_path / name) == texts, name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.lists(st.text(max_size=30), max_size=12), min_size=1, max_size=4),
    partitions=st.integers(1, 9),
    newline=st.booleans(),
    block=st.integers(1, 300),
)
def test_partitions_hold_every_document_once_in_order(files, partitions, newline, block, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(text_sources, "BLOCK", block)
    folder = tmp_path_factory.mktemp("parts")
    paths = []
    for number, texts in enumerate(files):
        data = lines([text.encode("utf-8", "replace").decode() for text in texts])
        paths.append(str(folder / f"{number}.jsonl"))
        Path(paths[-1]).write_bytes(data if newline else data.rstrip(b"\n"))
    parts = plan_partitions(paths, partitions)
    got = [
        text
        for part in parts
        for span in part
        for batch in read_documents(span, ["text"])
        for text in batch.texts["text"]
    ]
    assert got == [text.encode("utf-8", "replace").decode() for texts in files for text in texts]
    assert len(parts) <= partitions


BROKEN = {
    "broken JSON": (b'{"text": "a"', "broken JSON"),
    "no key": (b'{"txt": "a"}', "no key 'text', only \\['txt'\\]"),
    "not text": (b'{"text": 3}', "holds int, not text"),
    "not an object": (b"[1, 2]", "a JSON list where an object"),
    "invalid UTF-8": (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', "surrogate"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_line_is_named_or_skipped(kind, tmp_path):
    line, message = BROKEN[kind]
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(BadInputError, match=rf"b\.jsonl:3: .*{message}"):
        documents(path)
    batches = list(read_documents(whole(path), ["text"], skip_bad=True))
    assert [text for batch in batches for text in batch.texts["text"]] == ["one", "two"]
    assert sum(len(batch.bad) for batch in batches) == 1


def test_line_number_counts_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 50 + b"oops\n")
    last = plan_partitions([str(path)], 4)[-1][-1]
    assert last.start > 0
    with pytest.raises(BadInputError, match=r"b\.jsonl:51: "):
        list(read_documents(last, ["text"]))


@pytest.mark.parametrize("suffix", ["gz", "zst", "parquet"])
def test_truncated_file_is_named(suffix, tmp_path, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"t.jsonl.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        path.write_bytes(gzip.compress(lines(texts)) if suffix == "gz" else zstandard.compress(lines(texts)))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInputError, match="t.jsonl"):
        documents(path)


def test_json_that_only_the_standard_library_takes(tmp_path):
    path = tmp_path / "n.jsonl"
    path.write_text('{"text": "a", "score": NaN}\n{"text": "b"}\n')
    assert documents(path) == ["a", "b"]


def test_missing_input_is_named():
    with pytest.raises(FileNotFoundError, match="--input /nowhere/x.jsonl matches no file"):
        find_inputs(["/nowhere/x.jsonl"])


def test_glob_is_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text("")
    assert find_inputs([str(tmp_path / "*.jsonl")]) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


WIKI = """
 = Robert Boulter =

 Robert Boulter is an English film , television and theatre actor . He earned 1 @,@ 000 pounds ( about $ 1 @.@ 3k ) .
 He said " hello " and left @-@ handed N men 's hats .

 = = Career = =

 In 2006 he starred .
"""


def test_wikitext_sections_are_cleaned_documents(tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_text(WIKI)
    first, second = documents(path, read_wikitext)
    assert first.startswith("Robert Boulter is an English film, television and theatre actor. He earned 1,000 pounds")
    assert '(about $ 1.3k).\nHe said "hello" and left-handed 1 men\'s hats.' in first
    assert second == "In 2006 he starred."


def test_wikitext_partitions_never_cut_a_section(tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_text(WIKI * 20)
    expected = documents(path, read_wikitext)
    for partitions in (2, 3, 7):
        parts = plan_partitions([str(path)], partitions, is_heading)
        assert len(parts) > 1
        got = [
            text
            for part in parts
            for span in part
            for batch in read_wikitext(span, ["text"])
            for text in batch.texts["text"]
        ]
        assert got == expected


def test_wikitext_cleaning_agrees_with_mindformers():
    from mindformers.dataset.dataloader.datareaders import wikitext_clean

    prose = WIKI.split("Boulter =\n")[1].split(" = = Career")[0]
    for section in (prose, "a ( b ) , c [ d ] ; e { f } : g ' h ' 20 ° C N 's ; the actors ' own @-@ goal !"):
        lines_ = [line.strip() for line in section.strip().split("\n")]
        # In the files every line ends with a space, which upstream's punctuation rules rely on.
        theirs = wikitext_clean("".join(line + " \n" for line in lines_))
        assert clean_wikitext("\n".join(lines_)) == theirs.strip()


def test_invalid_utf8_in_plain_text(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"one\n\xff\xfe\ntwo\n")
    with pytest.raises(BadInputError, match=r"t\.txt:2: invalid UTF-8"):
        documents(path, read_text_lines)
    assert documents(path, read_text_lines, skip_bad=True) == ["one", "two"]
