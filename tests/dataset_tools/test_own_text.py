"""The quickstart's steps on a user's own text: what is trained on is that text, every character of it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mindformers_ext.bin_dataset.indexed_dataset import IndexedDataset
from mindformers_ext.bin_dataset.tokenizer import TextTokenizer

ROOT = Path(__file__).resolve().parents[2]
CODE = """
= Release notes =
The function returns x = a if N > 0 else b , and N is the size .

def f(N):
\tfor i in range(N):
        print("  two  spaces ", i)\x20\x20

He said ' hello ' and ( maybe ) it's 5 @-@ 6.\r\n== Second heading ==\r\nLast line.
""".lstrip("\n")
TEXTS = {
    "code and headings": CODE * 20,
    "no line end": "x ( y " * 20_000,
    "many pieces": CODE * 500,
    "other characters": "日本語 👩‍👩‍👧‍👦 \x0c \u2028 \x00 <｜User｜>\n" * 50,
    "open brackets": "a ( b [ c { d \" e ' f\n\n" * 20_000,
}


def quickstart_steps() -> str:
    """The part of the quickstart that makes data, as it stands in the script."""
    script = (ROOT / "scripts/quickstart.sh").read_text()
    return script[script.index('  if [ -n "$INPUT" ]') : script.index('  echo "$SOURCE" > "$DONE"')]


def make(folder: Path, text: str | None) -> str:
    """Run the quickstart's data steps; returns the prefix."""
    if text is not None:
        (folder / "my.txt").write_bytes(text.encode())
    script = f"""
set -euo pipefail
cd {ROOT}
python() {{ {sys.executable} "$@"; }}
INPUT={folder / "my.txt" if text is not None else ""}
SAMPLE={folder / "sample"}
{quickstart_steps()}
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(folder / "sample/sample_text_document")


@pytest.mark.parametrize("kind", TEXTS)
def test_own_text_is_trained_on_as_it_is(kind, tmp_path):
    started = time.monotonic()
    dataset = IndexedDataset(make(tmp_path, TEXTS[kind]))
    assert time.monotonic() - started < 60  # an open bracket took quadratic time: over 5 minutes
    tokenizer = TextTokenizer(tmp_path / "sample/tokenizer.json", fast=False)
    decoded = "".join(map(tokenizer.decode, dataset))
    assert decoded == TEXTS[kind] + "<｜end▁of▁sentence｜>"
    assert dataset.num_documents == 1


def test_byte_order_mark_is_no_text(tmp_path):
    dataset = IndexedDataset(make(tmp_path, "\ufeffone\n"))
    assert TextTokenizer(tmp_path / "sample/tokenizer.json").decode(dataset[0]) == "one\n<｜end▁of▁sentence｜>"


def test_without_input_the_corpus_is_wikitext(tmp_path):
    dataset = IndexedDataset(make(tmp_path, None))
    assert dataset.num_documents > 50
    assert (tmp_path / "sample/corpus.txt").read_text().startswith(" \n = ")
