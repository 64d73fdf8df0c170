"""From text files to a .bin/.idx pair: partition by partition, resumable, with a summary beside the output.

A job's output is ``P_<key>_document.bin/.idx`` and ``P_<key>_document.json``, the summary. With several partitions
each is written as its own finished pair first, with a summary of its own; a job that was interrupted keeps those that
belong to the same inputs, tokenizer and arguments, and writes the same bytes as one that was not.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from mindformers_ext.bin_dataset.indexed_dataset import (
    CorruptDatasetError,
    IndexedDataset,
    IndexedDatasetWriter,
    bin_path,
    idx_path,
    loss_mask_prefix,
)
from mindformers_ext.bin_dataset.shapes import AsIs, Shape, Shaped
from mindformers_ext.bin_dataset.text_sources import (
    KEPT_MESSAGES,
    Batch,
    Span,
    Text,
    plan_partitions,
    read_documents,
)
from mindformers_ext.bin_dataset.tokenizer import TextTokenizer, TokenizerError
from mindformers_ext.files import remote
from mindformers_ext.files.atomic import write_json

TOOL_VERSION = "2"  # Raise it when the same input gives other bytes.
AUTO_PARTITION_BYTES = 4 << 30

Item = TypeVar("Item")


class TokenRangeError(ValueError):
    """A token id that the model's vocabulary does not have."""


@dataclass
class Counts:
    """What went in and what came out. ``documents`` were read; ``sequences`` of ``tokens`` were written."""

    documents: int = 0
    empty_documents: int = 0
    bad_lines: int = 0
    truncated_documents: int = 0
    dropped_documents: int = 0
    dropped_tokens: int = 0
    padding_tokens: int = 0
    learnt_tokens: int = 0  # of a dataset with a loss mask
    reasoning_left_out: int = 0  # thoughts of assistants that the chat template does not write
    sequences: int = 0
    tokens: int = 0
    input_bytes: int = 0
    bad_line_messages: list[str] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Sum up two parts."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        del self.bad_line_messages[KEPT_MESSAGES:]


SHAPE_COUNTS = [item.name for item in fields(Shape)]


@dataclass(frozen=True)
class Job:
    """All that decides the output's bytes, and ``arguments``, which the summary repeats."""

    tool: str
    inputs: tuple[str, ...]
    prefix: str
    tokenizer: TextTokenizer
    dtype: type[np.number]
    keys: tuple[str, ...] = ("text",)
    read: Callable[..., Iterator[Batch]] = read_documents
    read_options: dict[str, object] = field(default_factory=dict)  # more arguments for `read`
    starts_document: Callable[[bytes], bool] = bool  # any line
    shape: Callable[[], Shape] = AsIs
    bos: int | None = None
    eod: int | None = None
    vocab_size: int | None = None  # the model's, if ids are to be checked against it
    partitions: int = 0  # 0: one per 4 GiB of input
    shard: tuple[int, int] = (0, 1)  # which part of the inputs, of how many that other machines take
    skip_bad_lines: bool = False
    log_interval: int = 1000  # documents between two updates of the progress line
    arguments: dict[str, object] = field(default_factory=dict)

    def output(self, key: str) -> str:
        """Prefix of the pair that holds one key's tokens."""
        return f"{self.prefix}_{key}_document"

    def outputs(self, prefix: str) -> list[str]:
        """Prefixes of all pairs that a part (or the whole) with this prefix writes."""
        tokens = [f"{prefix}_{key}_document" for key in self.keys]
        return tokens + [loss_mask_prefix(name) for name in tokens] if self.shape().has_mask else tokens

    def identity(self, partitions: int) -> str:
        """Hash that two runs share if they write the same bytes."""
        shape = self.shape()
        facts = {
            "version": TOOL_VERSION,
            "tool": self.tool,
            "inputs": list(map(remote.state, self.inputs)),
            "tokenizer": [self.tokenizer.sha256, self.tokenizer.backend],
            "dtype": np.dtype(self.dtype).name,
            "keys": self.keys,
            "shape": [type(shape).__name__, *(getattr(shape, item.name) for item in fields(shape) if item.init)],
            "marks": [self.bos, self.eod, self.vocab_size],
            "skip_bad_lines": self.skip_bad_lines,
            "read_options": self.read_options,
            "partitions": [partitions, self.shard],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def run(job: Job) -> Counts:
    """Write the job's output, or find it written. Returns the counts; raises what reading and writing raise."""
    started = time.monotonic()
    total = sum(map(remote.size, job.inputs))
    index, shards = job.shard
    partitions = job.partitions or max(1, -(-total // shards // AUTO_PARTITION_BYTES))
    parts = plan_partitions(job.inputs, partitions * shards, job.starts_document)
    parts = [part for part in parts[index * partitions : (index + 1) * partitions] if part] or [[]]
    identity = job.identity(partitions)
    done = finished_counts(job.prefix, job, identity)
    if done is None and remote.is_remote(job.prefix):
        done = _uploaded(job, run)
    elif done is None:
        done, files = _run_parts(job, parts, identity)
        for key in job.keys:
            _write_summary(f"{job.output(key)}.json", job, identity, done, files, time.monotonic() - started)
    else:
        print(f"{job.output(job.keys[0])} was finished by an earlier run of this command", file=sys.stderr)
    for number in range(0 if remote.is_remote(job.prefix) else len(parts)):
        _remove_part(job, number)
    return done


def write_documents(job: Job, batches: Iterator[Batch]) -> Counts:
    """Write the output of documents that an engine hands over; whether they are needed is the engine's to know."""
    if remote.is_remote(job.prefix):
        return _uploaded(job, partial(write_documents, batches=batches))
    started = time.monotonic()
    job = replace(job, read=lambda span, keys, skip_bad: batches)
    identity = job.identity(1)
    counts, files = _run_parts(job, [[Span("", 0, 0)]], identity)
    _write_summary(f"{job.output(job.keys[0])}.json", job, identity, counts, files, time.monotonic() - started)
    return counts


def _uploaded(job: Job, write: Callable[[Job], Counts]) -> Counts:
    """Write the output on this machine, where an interrupted run finds its partitions again, then to its address."""
    with remote.sent_to(job.prefix, job.outputs(job.prefix)) as prefix:
        return write(replace(job, prefix=prefix))


def _run_parts(job: Job, parts: list[list[Span]], identity: str) -> tuple[Counts, dict[str, object]]:
    """The counts, and what the manifest says of every file."""
    total = sum(span.end - span.start for part in parts for span in part)
    counts = Counts()
    with ExitStack() as stack, tqdm(total=total, unit="B", unit_scale=True, desc=job.tool, mininterval=0.5) as bar:
        wholes = _open(stack, job, job.prefix)  # first: what keeps other jobs from this one's partitions too
        if len(parts) == 1:
            counts = _run_part(job, parts[0], wholes, counts, bar)
        else:
            counts = _join_parts(job, parts, identity, wholes, bar)
    return counts, {Path(whole.prefix).name: whole.files for whole in wholes}


def _join_parts(
    job: Job, parts: list[list[Span]], identity: str, wholes: list[IndexedDatasetWriter], bar: tqdm
) -> Counts:
    """Write every part that an earlier run has not finished, then the whole of them."""
    counts = Counts()
    prefixes = [_part_prefix(job, number) for number in range(len(parts))]
    finished = [finished_counts(prefix, job, identity) for prefix in prefixes]
    if any(finished):
        done = sum(map(bool, finished))
        print(f"{done} of {len(parts)} partitions were finished by an earlier run", file=sys.stderr)
    for spans, prefix, part in zip(parts, prefixes, finished, strict=True):
        if part is None:
            with ExitStack() as of_part:
                part = _run_part(job, spans, _open(of_part, job, prefix), counts, bar)
            write_json(f"{prefix}.json", {"identity": identity, "counts": asdict(part)})
        else:
            bar.update(part.input_bytes)
        counts.add(part)
    for whole, sources in zip(wholes, zip(*map(job.outputs, prefixes), strict=True), strict=True):
        whole.add_indices(sources)
    return counts


def _open(stack: ExitStack, job: Job, prefix: str) -> list[IndexedDatasetWriter]:
    """A writer for every output of a part, or of the whole."""
    return [
        stack.enter_context(IndexedDatasetWriter(name, np.uint8 if number >= len(job.keys) else job.dtype))
        for number, name in enumerate(job.outputs(prefix))
    ]


def _run_part(job: Job, spans: list[Span], writers: list[IndexedDatasetWriter], before: Counts, bar: tqdm) -> Counts:
    counts = Counts()
    shapes = {key: job.shape() for key in job.keys}
    by_key = {key: writers[number :: len(job.keys)] for number, key in enumerate(job.keys)}
    shown = 0
    read = partial(job.read, keys=job.keys, skip_bad=job.skip_bad_lines, **job.read_options)
    for batch in _prefetch(batch for span in spans for batch in read(span)):
        for key in job.keys:
            encoded = encode_documents(job, batch.texts[key])
            mask = batch.learnt and learnt_mask(job.tokenizer, batch.texts[key], batch.learnt, *encoded[:2])
            _write(by_key[key], shapes[key].add(*encoded, mask), counts)
            counts.empty_documents += int((encoded[2] == 0).sum())
        counts.documents += len(batch.texts[job.keys[0]])
        counts.bad_lines += len(batch.bad)
        counts.reasoning_left_out += batch.reasoning_left_out
        counts.bad_line_messages += batch.bad[: KEPT_MESSAGES - len(counts.bad_line_messages)]
        counts.input_bytes += batch.input_bytes
        if counts.documents - shown >= job.log_interval:
            shown = counts.documents
            _show(bar, before, counts)
        bar.update(batch.input_bytes)
    for key in job.keys:
        _write(by_key[key], shapes[key].finish(), counts)
        for name in SHAPE_COUNTS:
            setattr(counts, name, getattr(counts, name) + getattr(shapes[key], name))
    job.tokenizer.finish_checks()  # before the files get their names
    _show(bar, before, counts)
    return counts


def _write(writers: list[IndexedDatasetWriter], shaped: Shaped, counts: Counts) -> None:
    for writer, values in zip(writers, (shaped.tokens, shaped.mask), strict=False):
        writer.add_batch(values, shaped.lengths, shaped.per_document)
    counts.sequences += len(shaped.lengths)
    counts.tokens += len(shaped.tokens)


def _show(bar: tqdm, before: Counts, counts: Counts) -> None:
    tokens = before.tokens + counts.tokens
    seconds = max(time.time() - bar.start_t, 1e-9)
    documents = before.documents + counts.documents
    bar.set_postfix_str(f"{documents} documents, {tokens / seconds / 1e6:.2f} M tokens/s", refresh=False)


def _prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; the next one is read in another thread while one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item


def encode_documents(job: Job, documents: list[Text]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat tokens, lengths of the non-empty sequences, and sequences per document, with the job's marks added."""
    if any(isinstance(document, list) for document in documents):
        nested = [document if isinstance(document, list) else [document] for document in documents]
        tokens, lengths = job.tokenizer.encode([sentence for sentences in nested for sentence in sentences])
        owner = np.repeat(np.arange(len(nested)), [len(sentences) for sentences in nested])
        per_document = np.bincount(owner[lengths > 0], minlength=len(nested))
    else:
        tokens, lengths = job.tokenizer.encode(documents)
        per_document = (lengths > 0).astype(np.int64)
    if job.vocab_size is not None and len(tokens) and tokens.max() >= job.vocab_size:
        raise TokenRangeError(
            f"tokenizer {job.tokenizer.path} gives id {tokens.max()}, outside --vocab-size {job.vocab_size}; use the "
            "model's own tokenizer, or raise vocab_size in the model"
        )
    return (*add_marks(tokens, lengths[lengths > 0], per_document, job.bos, job.eod), per_document)


def learnt_mask(
    tokenizer: TextTokenizer,
    texts: list[str],
    learnt: list[list[tuple[int, int]]],
    tokens: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
    """1 on each token that has a byte of what is learnt, 0 on the others: (tokens,) uint8."""
    mask = np.zeros(len(tokens), np.uint8)
    sizes = tokenizer.byte_lengths[tokens]
    ends = np.cumsum(lengths)
    for text, spans, first, last in zip(texts, learnt, ends - lengths, ends, strict=True):
        until = np.cumsum(sizes[first:last])
        if until[-1] != len(text.encode()):
            raise TokenizerError(
                f"{tokenizer.path} changes a text before it cuts it, so what the assistant wrote cannot be found in "
                f"the tokens of {text[:60]!r}; conversations need a byte-level tokenizer"
            )
        for start, end in spans:
            before = len(text[:start].encode())
            within = before, before + len(text[start:end].encode())
            mask[first + np.searchsorted(until, within[0], "right") : first + np.searchsorted(until, within[1]) + 1] = 1
    return mask


def add_marks(
    tokens: np.ndarray, lengths: np.ndarray, per_document: np.ndarray, bos: int | None, eod: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Put ``bos`` before the first and ``eod`` after the last sequence of every document that has one."""
    if bos is None and eod is None:
        return tokens, lengths
    ends = np.cumsum(per_document)
    first, last = (ends - per_document)[per_document > 0], ends[per_document > 0] - 1
    lengths = lengths.copy()
    if bos is not None:
        lengths[first] += 1
    if eod is not None:
        lengths[last] += 1
    sequence_ends = np.cumsum(lengths)
    marked = np.empty(int(lengths.sum()), tokens.dtype)
    is_text = np.ones(len(marked), bool)
    if bos is not None:
        where = (sequence_ends - lengths)[first]
        marked[where], is_text[where] = bos, False
    if eod is not None:
        where = sequence_ends[last] - 1
        marked[where], is_text[where] = eod, False
    marked[is_text] = tokens
    return marked, lengths


def finished_counts(prefix: str, job: Job, identity: str) -> Counts | None:
    """The counts of an output (or part) that was finished with the same identity, else None."""
    name = f"{job.output(job.keys[0])}.json" if prefix == job.prefix else f"{prefix}.json"
    try:
        summary = json.loads(remote.read_text(name))
        if summary["identity"] != identity:
            return None
        for name in job.outputs(prefix):
            remote.size(f"{name}.idx") if remote.is_remote(name) else IndexedDataset(name)
        return Counts(**summary["counts"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError, CorruptDatasetError):
        return None


def _write_summary(
    path: str, job: Job, identity: str, counts: Counts, files: dict[str, object], seconds: float
) -> None:
    summary = {
        "tool": job.tool,
        "tool_version": TOOL_VERSION,
        "identity": identity,
        "arguments": job.arguments,
        "inputs": list(job.inputs),
        "sources": [{"path": path, "bytes": remote.size(path)} for path in job.inputs],
        "shard": list(job.shard),
        "files": files,
        "tokenizer": str(job.tokenizer.path),
        "tokenizer_sha256": job.tokenizer.sha256,
        "tokenizer_backend": job.tokenizer.backend,
        "tokenizer_settings_switched_off": list(job.tokenizer.switched_off),
        "documents_checked_against_reference": job.tokenizer.checked,
        "vocab_size": job.tokenizer.vocab_size,
        "dtype": np.dtype(job.dtype).name,
        "counts": asdict(counts),
        "seconds": round(seconds, 3),
    }
    write_json(path, summary)


def _part_prefix(job: Job, number: int) -> str:
    return f"{job.prefix}.part{number:05d}"


def _remove_part(job: Job, number: int) -> None:
    prefix = _part_prefix(job, number)
    Path(f"{prefix}.json").unlink(missing_ok=True)
    for name in job.outputs(prefix):
        for path in (idx_path, bin_path):
            path(name).unlink(missing_ok=True)
