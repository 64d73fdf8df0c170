"""A small English corpus in WikiText format, from text that is already on the machine.

    python dataset_tools/make_sample_corpus.py --output output/sample/corpus.txt [--input my.txt]

Without --input the text is the language reference that every CPython carries (pydoc_data.topics, about 460 kB).
"""

import argparse
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


def main() -> int:
    """Write the corpus; a file that cannot be used is one sentence on standard error and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--input", type=Path, help="your own UTF-8 text instead of Python's documentation")
    args = parser.parse_args()
    try:
        own = args.input.read_text(encoding="utf-8") if args.input else None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        print(f"error: --input {args.input}: cannot be read: {reason}", file=sys.stderr)
        return 2
    if own is not None and not own.strip():
        print(f"error: --input {args.input} is empty; give a file with text", file=sys.stderr)
        return 2
    articles = reference_articles() if own is None else {args.input.stem: own}
    text = to_wikitext(articles)
    write_text(args.output, text)
    print(f"{args.output}: {len(articles)} documents, {len(text.encode()):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
