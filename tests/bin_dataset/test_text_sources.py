"""Reading text: formats, partitions, and input that is broken."""

import gzip
import json
import re
import time
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


def test_zstd_of_the_longest_window(tmp_path, texts):
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True, compression_level=3)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # of unknown size
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(lines(texts)) + stream.flush())
    assert documents(tmp_path / "a.jsonl.zst") == texts


def test_skippable_zstd_frames(tmp_path, texts):
    frame = b"\x50\x2a\x4d\x18\x04\x00\x00\x00note"
    (tmp_path / "a.jsonl.zst").write_bytes(frame + zstandard.compress(lines(texts)) + frame)
    assert documents(tmp_path / "a.jsonl.zst") == texts


COLUMNS = {
    "int64": ([None, 3], "int64"),
    "binary": ([None, b"a"], "binary"),
    "list<element: string>": ([None, ["a"]], r"list<.*string>"),
    "double": ([float("nan")], "double"),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_parquet_column_is_judged_by_its_type(kind, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    values, name = COLUMNS[kind]
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(BadInputError, match=f"a.parquet: column 'text' holds {name}, not text"):
        documents(tmp_path / "a.parquet")


def test_parquet_text_of_any_kind(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        pq.write_table(pa.table({"text": pa.array([None, "a", "", "b"], kind)}), tmp_path / "a.parquet")
        assert documents(tmp_path / "a.parquet") == ["", "a", "", "b"]
    pq.write_table(pa.table({"text": [None, None]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == ["", ""]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(["one", "two"]))
    assert documents(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert documents(tmp_path / "a.txt", read_text_lines) == ["one", "two"]
    (tmp_path / "wiki.tokens").write_bytes(b"\xef\xbb\xbf = Title = \n \n text \n")
    assert documents(tmp_path / "wiki.tokens", read_wikitext) == ["text"]


def test_wikitext_from_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "wiki.tokens").write_text(WIKI)
    pq.write_table(pa.table({"text": [line + "\n" for line in WIKI.split("\n")]}), tmp_path / "wiki.parquet")
    expected = documents(tmp_path / "wiki.tokens", read_wikitext)
    assert documents(tmp_path / "wiki.parquet", read_wikitext) == expected


def other_formats():
    import bz2
    import io
    import lzma

    import pyarrow as pa
    import pyarrow.parquet as pq

    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), table)
    text = b"some text\n" * 9
    return {
        "parquet": table.getvalue(),
        "gzip": gzip.compress(text),
        "zstd": zstandard.compress(text),
        "xz": lzma.compress(text),
        "bzip2": bz2.compress(text),
        "UTF-16": "some text\n".encode("utf-16"),
    }


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("read", [read_documents, read_text_lines, read_wikitext])
@pytest.mark.parametrize("kind", ["parquet", "gzip", "zstd", "xz", "bzip2", "UTF-16"])
def test_a_file_of_another_format_is_named_and_never_text(kind, read, skip_bad, tmp_path):
    (tmp_path / "a.txt").write_bytes(other_formats()[kind])
    with pytest.raises(BadInputError, match=f"a.txt holds no UTF-8 text: it is {kind}"):
        documents(tmp_path / "a.txt", read, skip_bad=skip_bad)


def test_text_that_begins_like_parquet(tmp_path):
    (tmp_path / "a.txt").write_text("PAR1 is a word\n")
    assert documents(tmp_path / "a.txt", read_text_lines) == ["PAR1 is a word"]


def test_json_lines_are_no_wikitext(tmp_path):
    (tmp_path / "wiki.tokens").write_bytes(lines(["one"]))
    with pytest.raises(BadInputError, match="wiki.tokens holds JSON lines, not WikiText; use jsonl_to_bin.py"):
        documents(tmp_path / "wiki.tokens", read_wikitext)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["(", ")", "[", "]", "{", "}", '"', "'", "a", "s", " ", "  ", "\t", "°", "N"])))
def test_space_inside_pairs_as_the_regular_expressions_of_mindformers(parts):
    text = "".join(parts)
    expected = text
    for pattern, replacement in (
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
    ):
        expected = re.sub(pattern, replacement, expected)
    for opening, closing in text_sources._PAIRS:
        text = text_sources._without_space_inside(text, opening, closing)
    assert text == expected


@pytest.mark.parametrize("part", ["( a ", "[", "{ ", "\" '", " ", " N", "s '", " @", "\n ", "= "])
def test_wikitext_rules_take_linear_time(part):
    text = part * (1_000_000 // len(part))
    started = time.monotonic()
    clean_wikitext(text)
    assert time.monotonic() - started < 2  # quadratic: over 5 minutes
