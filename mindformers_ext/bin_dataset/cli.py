"""What the command lines in dataset_tools/ share: arguments, errors as one sentence, the summary.

numpy and the pipeline are imported where they are used, while the tokenizer loads.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

from mindformers_ext.bin_dataset.tokenizer import TextTokenizer
from mindformers_ext.errors import FULL, INTERRUPTED, of_files

if TYPE_CHECKING:
    from mindformers_ext.bin_dataset.pipeline import Counts, Job

DTYPE_NAMES = ("int16", "int32", "int64", "int8", "uint16", "uint8")  # the format's dtypes that hold token ids


def text_parser(description: str, dtype: str, marks: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments of every tool that turns text into tokens; ``dtype`` is the default one.

    ``description`` is the tool's docstring, shown as it is; ``marks``: whether eod and bos tokens can be asked for.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="input files or glob patterns")
    parser.add_argument("--output-prefix", required=True, help="P, for P_text_document.bin and .idx")
    parser.add_argument(
        "--vocab-file",
        "--tokenizer-model",
        dest="tokenizer",
        required=True,
        help="tokenizer.json, HuggingFace folder, sentencepiece .model or tiktoken file",
    )
    parser.add_argument("--workers", "--worker", type=int, default=os.cpu_count(), help="threads (default: all cores)")
    parser.add_argument("--partitions", type=int, default=0, help="resumable parts (default: one per 4 GiB of input)")
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="write part I of N (from 0) for merge_bin.py to join"
    )
    if marks:
        parser.add_argument("--append-eod", action="store_true", help="end every document with the eod token")
        parser.add_argument("--eod-token", help="name of that token (default: eos_token of tokenizer_config.json)")
        parser.add_argument("--add-bos", action="store_true", help="begin every document with the bos token")
        parser.add_argument("--bos-token", help="name of that token")
    parser.add_argument(
        "--dtype", choices=["auto", *DTYPE_NAMES], default=dtype, help=f"default {dtype}; auto: uint16 below 65500 ids"
    )
    parser.add_argument("--vocab-size", type=int, help="stop at token ids that a model of this vocab_size lacks")
    parser.add_argument("--skip-bad-lines", action="store_true", help="count and skip lines that cannot be read")
    parser.add_argument("--no-fast-tokenizer", action="store_true", help="use the reference library `tokenizers`")
    parser.add_argument("--log-interval", type=int, default=1000, help="documents between updates of the progress line")
    return parser


def shard(text: str) -> tuple[int, int]:
    """``3/10`` as (3, 10)."""
    index, _, shards = text.partition("/")
    if not (index.isdecimal() and shards.isdecimal() and int(index) < int(shards)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
    return int(index), int(shards)


def shard_prefix(prefix: str, index: int, shards: int) -> str:
    """Prefix of one of many parts; sorted by name they are in order."""
    return prefix if shards == 1 else f"{prefix}.shard-{index:05d}-of-{shards:05d}"


def load_tokenizer(args: argparse.Namespace) -> TextTokenizer:
    """Start to load the tokenizer of the arguments, with as many threads as --workers says."""
    if args.workers < 1 or args.partitions < 0 or args.log_interval < 1:
        raise ValueError("--workers and --log-interval must be at least 1, --partitions at least 0")
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # Both tokenizer libraries read it when they start.
    return TextTokenizer(args.tokenizer, fast=not args.no_fast_tokenizer)


def text_job(tool: str, args: argparse.Namespace, tokenizer: TextTokenizer, **more: object) -> Job:
    """A job from the common arguments; ``more`` are fields only this tool sets."""
    from mindformers_ext.bin_dataset.indexed_dataset import CODES, smallest_dtype
    from mindformers_ext.bin_dataset.pipeline import Job
    from mindformers_ext.bin_dataset.text_sources import find_inputs

    name = smallest_dtype(tokenizer.vocab_size).__name__ if args.dtype == "auto" else args.dtype
    dtype = next(dtype.type for dtype in CODES if str(dtype) == name)
    return Job(
        tool=tool,
        inputs=tuple(find_inputs(args.input)),
        prefix=shard_prefix(args.output_prefix, *args.shard),
        shard=args.shard,
        tokenizer=tokenizer,
        dtype=dtype,
        eod=tokenizer.special_id("eod", args.eod_token) if getattr(args, "append_eod", False) else None,
        bos=tokenizer.special_id("bos", args.bos_token) if getattr(args, "add_bos", False) else None,
        vocab_size=args.vocab_size,
        partitions=args.partitions,
        skip_bad_lines=args.skip_bad_lines,
        log_interval=args.log_interval,
        arguments={key: value for key, value in vars(args).items() if value is not None},
        **more,
    )


def run_and_report(job: Job) -> None:
    """Run a job and print its summary."""
    from mindformers_ext.bin_dataset.pipeline import run

    started = time.monotonic()
    try:
        counts = run(job)
    finally:
        job.tokenizer.close()
    print(summary(job, counts, time.monotonic() - started))


def summary(job: Job, counts: Counts, seconds: float) -> str:
    """What was read, written, empty or dropped and why."""
    lines = [
        f"read     {counts.documents} documents, {counts.input_bytes / 1e6:.1f} MB from {len(job.inputs)} file(s)",
        f"written  {counts.sequences} sequences, {counts.tokens} tokens ({job.dtype.__name__})",
        f"empty    {counts.empty_documents} documents without a token",
        f"dropped  {counts.bad_lines} unreadable lines, {counts.dropped_tokens} tokens past the sample length "
        f"({counts.truncated_documents} documents cut, {counts.dropped_documents} left out)",
        *_of_samples(counts),
        *(f"settings {text} in {job.tokenizer.path} is switched off" for text in job.tokenizer.switched_off),
        f"checked  {_checked(job.tokenizer)}",
        f"speed    {seconds:.1f} s, {counts.input_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s, "
        f"{counts.tokens / max(seconds, 1e-9) / 1e6:.2f} M tokens/s",
    ]
    if not counts.sequences:
        lines.append("warning  no sequence was written: the input has no text, or less than one sample")
    lines += [f"skipped  {message}" for message in counts.bad_line_messages]
    lines += [f"output   {job.output(key)}.bin .idx .json" for key in job.keys]
    return "\n".join(lines)


def _of_samples(counts: Counts) -> Iterator[str]:
    """What only datasets of padded or masked samples have."""
    if counts.padding_tokens:
        yield f"padding  {counts.padding_tokens} tokens, {counts.padding_tokens / counts.tokens:.1%} of what is written"
    if counts.learnt_tokens:
        yield f"learnt   {counts.learnt_tokens} tokens, {counts.learnt_tokens / counts.tokens:.1%} of what is written"
    if counts.reasoning_left_out:
        yield f"warning  the chat template left {counts.reasoning_left_out} texts of reasoning_content out"


def _checked(tokenizer: TextTokenizer) -> str:
    if tokenizer.backend != "fastokens":
        return f"no documents: {tokenizer.backend} is the reference itself"
    return f"{tokenizer.checked} documents against `tokenizers`, {tokenizer.backend} in use"


def run_tool(tool: Callable[[list[str] | None], None]) -> NoReturn:
    """Run a tool as this process, and end it without taking the tokenizer's tables apart (a tenth of a short run)."""
    status = main(tool)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(tool: Callable[[list[str] | None], None], arguments: list[str] | None = None) -> int:
    """Run a tool; a refused input or a full disk is one sentence on stderr and exit status 1."""
    try:
        tool(arguments)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        advice = " Free some space and run the same command again." if error.errno in FULL else ""
        print(f"error: {of_files(error) or error}; finished partitions are kept.{advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last finished partition", file=sys.stderr)
        return INTERRUPTED
    return 0
