"""A small English corpus in WikiText format from text that is already on the machine, or your own text as JSONL.

    python dataset_tools/make_sample_corpus.py --output output/sample/corpus.txt
    python dataset_tools/make_sample_corpus.py --input my.txt --output output/sample/corpus.jsonl

Without --input the text is the language reference that every CPython carries (pydoc_data.topics, about 460 kB), for
wikitext_to_bin.py. Your own text is kept as it is, line ends and spaces too: one document for jsonl_to_bin.py.
"""

import argparse
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindformers_ext.errors import exit_code_of
from mindformers_ext.files.atomic import write_text


def reference_articles() -> dict[str, str]:
    """Title and text of every topic of Python's own documentation, duplicates left out, sorted by name."""
    seen: set[str] = set()
    articles = {}
    for name, text in sorted(topics.items()):
        if text not in seen:
            articles[name] = text
            seen.add(text)
    return articles


def to_wikitext(articles: dict[str, str]) -> str:
    """Join articles the way WikiText does: ` = Title = ` on a line of its own, then one line per paragraph."""
    parts = []
    for title, text in articles.items():
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        body = "".join(f" {paragraph} \n \n" for paragraph in paragraphs if paragraph)
        parts.append(f" \n = {title} = \n \n{body}")
    return "".join(parts)


PIECE = 50_000  # characters of a sequence of your own text: training and validation get whole sequences


def to_json_line(text: str) -> str:
    """One document whose sequences, joined, are the text; they end at line ends where there are any."""
    pieces, start = [], 0
    while start < len(text):
        line_end = text.rfind("\n", start, start + PIECE) + 1
        end = line_end if line_end and start + PIECE < len(text) else start + PIECE
        pieces.append(text[start:end])
        start = end
    return json.dumps({"text": pieces}, ensure_ascii=False) + "\n"


def main() -> int:
    """Write the corpus; a file that cannot be used is one sentence on standard error and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--input", type=Path, help="your own UTF-8 text instead of Python's documentation")
    args = parser.parse_args()
    try:
        own = args.input.read_bytes().decode("utf-8-sig") if args.input else None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        print(f"error: --input {args.input}: cannot be read: {reason}", file=sys.stderr)
        return 2
    if own is not None and not own.strip():
        print(f"error: --input {args.input} is empty; give a file with text", file=sys.stderr)
        return 2
    articles = reference_articles() if own is None else {args.input.stem: own}
    text = to_wikitext(articles) if own is None else to_json_line(own)
    write_text(args.output, text)
    print(f"{args.output}: {len(articles)} documents, {len(text.encode()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
