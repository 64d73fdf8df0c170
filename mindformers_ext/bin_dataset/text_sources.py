"""Read documents in bounded batches from JSONL (plain, .gz, .zst), parquet, plain text and WikiText files."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from mindformers_ext.files import remote

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 4 << 20  # bytes of text a batch: large enough to keep all cores busy, small enough to forget
KEPT_MESSAGES = 10
HUB = "hf://"  # how an input begins that HuggingFace's `datasets` loads
LONGEST_WINDOW = 1 << 31  # bytes a zstd frame may refer back to: what `zstd --long=31`, its largest, writes

Text = str | list[str]  # A document, or its sentences (each becomes a sequence of its own, as in Megatron).


class BadInputError(ValueError):
    """Input that cannot be read as documents; the message names file and line."""


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file, whole documents; compressed files and parquet are one span."""

    path: str
    start: int
    end: int


@dataclass
class Batch:
    """Some documents: ``texts[key]`` has one entry per document."""

    texts: dict[str, list[Text]]
    input_bytes: int  # how far the batch advanced in the file
    bad: list[str] = field(default_factory=list)  # messages of the lines skipped
    learnt: list[list[tuple[int, int]]] | None = None  # characters [start, end) of each document that are learnt
    reasoning_left_out: int = 0  # thoughts of assistants that the chat template does not write


def find_inputs(patterns: Sequence[str]) -> list[str]:
    """Files that match the given names or glob patterns, sorted within a pattern. Raises FileNotFoundError."""
    found: list[str] = []
    for pattern in patterns:
        if pattern.startswith(HUB):
            found += huggingface_files(pattern)
            continue
        matching = remote.matches(pattern)
        if not matching:
            raise FileNotFoundError(f"--input {pattern} matches no file")
        found += matching
    return list(dict.fromkeys(found))


def huggingface_files(address: str) -> list[str]:
    """Arrow files of ``hf://NAME[:CONFIG][@SPLIT]``, a name of HuggingFace's hub or a folder; the split is train.

    The package `datasets` downloads it and keeps it in its own cache (HF_HOME).
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadInputError(f"--input {address} needs `pip install datasets` ({error})") from None
    name, _, split = address.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    try:
        data = load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the package raises whatever its parts raise
        raise BadInputError(f"--input {address} cannot be loaded: {str(error).splitlines()[0]}") from error
    return [item["filename"] for item in data.cache_files]


def plan_partitions(
    paths: Sequence[str], partitions: int, starts_document: Callable[[bytes], bool] = lambda line: True
) -> list[list[Span]]:
    """Cut the inputs, in order, into ``partitions`` parts of about the same size; some may be empty.

    Cuts fall before lines for which ``starts_document`` holds, and between files where a file cannot be cut.
    """
    with ThreadPoolExecutor(16) as pool:  # a server answers many questions at once
        sizes = list(pool.map(remote.size, paths))
    total = sum(sizes)
    parts: list[list[Span]] = [[] for _ in range(partitions)]
    before = 0
    for path, size in zip(paths, sizes, strict=True):
        if _is_cuttable(path):
            first, last = (bytes_ * partitions // max(total, 1) for bytes_ in (before, before + size))
            cuts = (total * i // partitions - before for i in range(first, last + 1))
            cuts = sorted({0, size, *(cut for cut in cuts if 0 < cut < size)})
            bounds = [_align(path, cut, size, starts_document) for cut in cuts]
        else:
            bounds = [0, size]
        for start, end in zip(bounds, bounds[1:], strict=False):
            if start < end:
                number = min(partitions - 1, (before + start) * partitions // max(total, 1))
                parts[number].append(Span(path, start, end))
        before += size
    return parts


def is_table(path: str) -> bool:
    """Whether a file holds columns: parquet, or the Arrow files of HuggingFace's `datasets`."""
    return path.endswith((".parquet", ".arrow"))


def _is_cuttable(path: str) -> bool:
    return Path(path).suffix not in (".gz", ".zst") and not is_table(path) and not is_json_array(path)


def is_json_array(path: str) -> bool:
    """Whether a .json file is one array rather than an object a line."""
    if not path.endswith(".json"):
        return False
    with remote.open_binary(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _align(path: str, offset: int, size: int, starts_document: Callable[[bytes], bool]) -> int:
    """The first document start at or after ``offset``."""
    if offset in (0, size):
        return offset
    with remote.open_binary(path) as file:
        file.seek(offset - 1)
        file.readline()
        while True:
            position = file.tell()
            line = file.readline()
            if not line or starts_document(line):
                return position


def read_json_lines(span: Span, keys: Sequence[str], skip_bad: bool = False) -> Iterator[Batch]:
    """Documents of a JSONL span, one object a line with text (or a list of sentences) under each key.

    Blank lines are no documents. Raises BadInputError for a broken line, unless ``skip_bad``.
    """
    fields = [(f"column{i}", Text, msgspec.field(name=key)) for i, key in enumerate(keys)]
    decoder = msgspec.json.Decoder(msgspec.defstruct("Row", fields))
    names = [name for name, _, _ in fields]
    for block, advance, done in blocks(span):
        bad: list[str] = []
        try:
            rows = decoder.decode_lines(block)
            texts = {key: [getattr(row, name) for row in rows] for key, name in zip(keys, names, strict=True)}
        except (msgspec.MsgspecError, UnicodeDecodeError):
            texts = _decode_one_by_one(block, span, done, keys, bad)
        if bad and not skip_bad:
            raise BadInputError(f"{bad[0]}; repair the line, or count and skip such lines with --skip-bad-lines")
        yield Batch(texts, advance, bad)


def _decode_one_by_one(
    block: bytes, span: Span, lines_before_block: int, keys: Sequence[str], bad: list[str]
) -> dict[str, list[Text]]:
    """The documents of a block with a broken line, by the standard library's parser, which Megatron uses."""
    texts: dict[str, list[Text]] = {key: [] for key in keys}
    for number, line in enumerate(block.split(b"\n")):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            values = [_checked_text(row, key) for key in keys]
        except (ValueError, RecursionError) as error:
            first = 1 + lines_before_block + number + lines_before(span)
            bad.append(f"{span.path}:{first}: {_reason(error)}: {line[:60]!r}")
            continue
        for key, value in zip(keys, values, strict=True):
            texts[key].append(value)
    return texts


def _checked_text(row: object, key: str) -> Text:
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} where an object with {key!r} is needed")
    if key not in row:
        raise ValueError(f"no key {key!r}, only {list(row)[:8]}")
    value = row[key]
    for part in value if isinstance(value, list) else [value]:
        if not isinstance(part, str):
            raise ValueError(f"{key!r} holds {type(part).__name__}, not text")
        part.encode("utf-8")  # A lone surrogate (\ud800) is no text.
    return value


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start} of the line"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair"
    return f"broken JSON ({error})" if isinstance(error, json.JSONDecodeError) else str(error)


def lines_before(span: Span) -> int:
    """Lines of the file before the span; they are read again for it."""
    if span.start == 0:
        return 0
    with remote.open_binary(span.path) as file:
        return sum(file.read(min(BLOCK, span.start - at)).count(b"\n") for at in range(0, span.start, BLOCK))


def table_batches(span: Span, columns: Sequence[str] | None = None) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Rows of a parquet or Arrow file, and how far each batch advanced in the file. Raises BadInputError."""
    import pyarrow as pa

    read = _parquet_batches if span.path.endswith(".parquet") else _arrow_batches
    try:
        names, rows, batches = read(span.path, columns)
        missing = set(columns or ()) - set(names)
        if missing:
            raise BadInputError(f"{span.path} has no column {sorted(missing)}, only {names}")
        for group in batches:
            yield group, span.end * len(group) // max(1, rows)
    except (pa.ArrowException, OSError) as error:
        kind = "parquet" if span.path.endswith(".parquet") else "Arrow"
        raise BadInputError(f"{span.path} is no readable {kind} file: {error}") from error


Table = tuple[list[str], int, Iterator["pa.RecordBatch"]]  # names of columns, rows, and the rows


def _parquet_batches(path: str, columns: Sequence[str] | None) -> Table:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(remote.open_binary(path) if remote.is_remote(path) else path)
    rows = file.iter_batches(batch_size=2000, columns=columns and list(columns))
    return file.schema_arrow.names, file.metadata.num_rows, rows


def _arrow_batches(path: str, columns: Sequence[str] | None) -> Table:
    import pyarrow as pa

    file = remote.open_binary(path) if remote.is_remote(path) else pa.memory_map(path)
    table = pa.ipc.open_stream(file).read_all()  # of a mapped file no row is read yet
    chosen = table.select(list(columns)) if columns and set(columns) <= set(table.column_names) else table
    return table.column_names, len(table), iter(chosen.to_batches(max_chunksize=2000))


def read_table(span: Span, keys: Sequence[str], skip_bad: bool = False) -> Iterator[Batch]:
    """Documents of a parquet or Arrow file, one row each; null is an empty document."""
    for group, advance in table_batches(span, keys):
        for key in keys:
            if not _is_text_column(group.column(key).type):
                raise BadInputError(f"{span.path}: column {key!r} holds {group.column(key).type}, not text")
        try:
            texts = {key: [value or "" for value in group.column(key).to_pylist()] for key in keys}
        except UnicodeDecodeError as error:
            raise BadInputError(f"{span.path}: a column of {list(keys)} holds invalid UTF-8: {error}") from error
        yield Batch(texts, advance)


def _is_text_column(kind: pa.DataType) -> bool:
    """By its type, not by its first value, which may be null; a column of nulls alone is empty text."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)


def read_documents(span: Span, keys: Sequence[str], skip_bad: bool = False) -> Iterator[Batch]:
    """Documents of a JSONL or parquet span, chosen by the file's name."""
    read = read_table if is_table(span.path) else read_json_lines
    return read(span, keys, skip_bad)


def read_text_lines(span: Span, keys: Sequence[str], skip_bad: bool = False) -> Iterator[Batch]:
    """Plain text, each line that is not blank a document."""
    for lines, advance, bad in _text_blocks(span, skip_bad):
        yield Batch({keys[0]: [line for line in lines if line.strip()]}, advance, bad)


def is_text_file(path: str) -> bool:
    """Whether a file is plain text rather than JSON or parquet."""
    return Path(path.removesuffix(".gz").removesuffix(".zst")).suffix not in (".json", ".jsonl", ".parquet", ".arrow")


def read_any_text(span: Span, keys: Sequence[str], skip_bad: bool = False) -> Iterator[Batch]:
    """Documents of plain text (a line each), JSONL or parquet, chosen by the file's name."""
    return (read_text_lines if is_text_file(span.path) else read_documents)(span, keys, skip_bad)


def read_wikitext(span: Span, keys: Sequence[str], skip_bad: bool = False) -> Iterator[Batch]:
    """WikiText-2/103 (`wiki.*.tokens`): each section's text, without headings and tokenizer marks, is a document.

    A parquet file has a line in each row's `text`, as HuggingFace keeps WikiText.
    """
    section: list[str] = []
    if is_table(span.path):
        rows = read_table(span, ["text"])
        batches = (("\n".join(batch.texts["text"]).split("\n"), batch.input_bytes, []) for batch in rows)
    else:
        batches = _text_blocks(span, skip_bad)
    for number, (lines, advance, bad) in enumerate(batches):
        if number == 0 and lines[0].startswith('{"'):
            raise BadInputError(f"{span.path} holds JSON lines, not WikiText; use jsonl_to_bin.py")
        documents = []
        for line in lines:
            if is_heading(line):
                documents += _section_text(section)
            else:
                section.append(line)
        yield Batch({keys[0]: documents}, advance, bad)
    yield Batch({keys[0]: _section_text(section)}, 0)


def is_heading(line: str | bytes) -> bool:
    """Whether a WikiText line is a heading such as `` = = Title = = ``."""
    text = (line.decode("utf-8", "replace") if isinstance(line, bytes) else line).strip()
    return len(text) > 1 and text.startswith("= ") and text.endswith(" =")


def _section_text(section: list[str]) -> list[str]:
    text = clean_wikitext("\n".join(line.strip() for line in section if line.strip()))
    section.clear()
    return [text] if text else []


_NUMBER_MARK = re.compile(r" @([-,.])@ ")
_PUNCTUATION = re.compile(r" ([:;.!?,]) ")
_LAST_PUNCTUATION = re.compile(r"(?m) ([:;.!?,])$")
_PAIRS = ("()", "[]", "{}", '""', "''")


def clean_wikitext(text: str) -> str:
    """Undo WikiText's tokenization of one section: ``1 @,@ 000 ( a )`` becomes ``1,000 (a)``.

    WikiText writes text as tokens apart; each line joins one kind again. The time is linear in the text.
    """
    text = text.replace("s '", "s'")
    text = _NUMBER_MARK.sub(r"\1", text)
    text = _PUNCTUATION.sub(r"\1 ", text)
    for opening, closing in _PAIRS:
        text = _without_space_inside(text, opening, closing)
    text = text.replace(" ° ", "°")
    text = _without_space_at_line_ends(text)
    text = text.replace(" N ", " 1 ")
    text = text.replace(" 's", "'s")
    return _LAST_PUNCTUATION.sub(r"\1", text).strip()


def _without_space_inside(text: str, opening: str, closing: str) -> str:
    """``( a )`` as ``(a)``, for each opening and the first closing after it."""
    parts = []
    done = 0
    while (start := text.find(opening, done) + 1) and (end := text.find(closing, start)) >= 0:
        parts += (text[done:start], text[start:end].strip(), closing)
        done = end + 1
    return "".join([*parts, text[done:]])


def _without_space_at_line_ends(text: str) -> str:
    first, *others = text.split("\n")
    if not others:
        return text
    *middle, last = others
    return "\n".join([first.rstrip(" "), *(line.strip(" ") for line in middle), last.lstrip(" ")])


def _text_blocks(span: Span, skip_bad: bool) -> Iterator[tuple[list[str], int, list[str]]]:
    for block, advance, done in blocks(span):
        bad: list[str] = []
        try:
            lines = block.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            lines = list(_valid_lines(block, span, done, bad))
            if not skip_bad:
                raise BadInputError(f"{bad[0]}; use --skip-bad-lines to skip it") from error
        yield lines, advance, bad


def _valid_lines(block: bytes, span: Span, done: int, bad: list[str]) -> Iterator[str]:
    for number, line in enumerate(block.split(b"\n"), 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            bad.append(f"{span.path}:{lines_before(span) + done + number}: invalid UTF-8")


def blocks(span: Span) -> Iterator[tuple[bytes, int, int]]:
    """Whole lines of a span, about BLOCK bytes at once, the bytes of the file they took, and the lines before them.

    The byte order mark that some editors write before UTF-8 is left out. Raises BadInputError for a damaged file, and
    for one that is no text whatever its name says.
    """
    at_start, lines = span.start == 0, 0
    with remote.open_binary(span.path) as raw:
        stream = _decompressed(raw, span)
        remaining = span.end - span.start if _is_cuttable(span.path) else None
        at = raw.tell()
        while remaining is None or remaining > 0:
            try:
                block = stream.read(BLOCK if remaining is None else min(BLOCK, remaining))
                block += b"" if block.endswith(b"\n") else stream.readline()
            except (EOFError, OSError, zlib.error) as error:
                raise BadInputError(f"{span.path} is truncated or damaged: {error}") from error
            if not block:
                return
            if at_start:
                _refuse_other_formats(block, span.path)
            if remaining is not None:
                remaining -= len(block)
            yield (block.removeprefix(codecs.BOM_UTF8) if at_start else block), raw.tell() - at, lines
            at, at_start, lines = raw.tell(), False, lines + block.count(b"\n")


# How files begin that are no text; parquet also ends so.
_OTHER_FORMATS = {
    b"PAR1": "parquet; give it a name that ends with .parquet",
    b"\x1f\x8b": "gzip; give it a name that ends with .gz",
    b"\x28\xb5\x2f\xfd": "zstd; give it a name that ends with .zst",
    b"\xfd7zXZ\x00": "xz; unpack it first",
    b"BZh91AY&SY": "bzip2; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    codecs.BOM_UTF16_LE: "UTF-16 text; write it as UTF-8 first",
    codecs.BOM_UTF16_BE: "UTF-16 text; write it as UTF-8 first",
}


def _refuse_other_formats(block: bytes, path: str) -> None:
    for mark, kind in _OTHER_FORMATS.items():
        if block.startswith(mark) and (mark != b"PAR1" or _is_parquet(path)):
            raise BadInputError(f"{path} holds no UTF-8 text: it is {kind}")


def _is_parquet(path: str) -> bool:
    with remote.open_binary(path) as file:
        file.seek(-4, os.SEEK_END)
        return file.read() == b"PAR1"


def _decompressed(raw: io.BufferedReader, span: Span) -> io.BufferedIOBase:
    if span.path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if span.path.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(raw), BLOCK)
    raw.seek(span.start)
    return raw


class _ZstdReader(io.RawIOBase):
    """Zstandard frames as a stream. zstandard's own stream_reader takes a truncated file for a finished one."""

    def __init__(self, raw: io.BufferedReader) -> None:
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor(max_window_size=LONGEST_WINDOW).decompressobj
        self._error = zstandard.ZstdError
        self._frame, self._data, self._inside = self._new(), memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._data:
            packed = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read(1 << 17)
            if not packed:
                if self._inside and not self._frame.eof:
                    raise EOFError("the last zstd frame has no end")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            try:
                self._data, self._inside = memoryview(self._frame.decompress(packed)), True
            except self._error as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._data))
        buffer[:count] = self._data[:count]
        self._data = self._data[count:]
        return count
