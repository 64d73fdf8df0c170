"""Instruction data through DeepSeek-V3's chat template: Alpaca, ShareGPT and messages files to text with roles.

The template is DeepSeek-V3's: begin of sentence, the system text, and each turn as ``<｜User｜>question`` or
``<｜Assistant｜>answer<｜end▁of▁sentence｜>``. A conversation is a list of segments: by turns a prompt (not
learnt) and the assistant's words with their end mark (learnt). Segments meet at special tokens, where a tokenizer
cuts anyway, so their ids are those of the whole text.
"""

import json
from collections.abc import Iterator, Sequence

from mindformers_ext.bin_dataset.text_sources import BadInputError, Batch, Span, blocks, is_json_array

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROWS_PER_BATCH = 1000


def render(messages: Sequence[tuple[str, str]]) -> list[str]:
    """Segments of a conversation of (role, text): prompt, answer, prompt, answer... A last prompt is left out.

    Raises ValueError if no assistant speaks.
    """
    segments: list[str] = []
    prompt = BOS + "\n\n".join(text for role, text in messages if role == "system")
    for role, text in messages:
        if role == "user":
            prompt += USER + text
        elif role == "assistant":
            segments += [prompt + ASSISTANT, text + EOS]
            prompt = ""
    if not segments:
        raise ValueError("no message of an assistant to learn from")
    return segments


def parse_row(row: object) -> list[tuple[str, str]]:
    """(role, text) of one conversation: ``messages``, ``conversations`` (ShareGPT) or ``instruction`` (Alpaca)."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} where a conversation object is needed")
    if "instruction" in row:
        question, more, answer = (_text(row, key) for key in ("instruction", "input", "output"))
        return [("user", f"{question}\n{more}" if more else question), ("assistant", answer)]
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        raise ValueError(f"no messages, conversations or instruction, only {list(row)[:8]}")
    return [_turn(turn) for turn in turns]


def _turn(turn: object) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is {type(turn).__name__}, not an object")
    role = turn.get("role", turn.get("from"))
    if role not in ROLES:
        raise ValueError(f"role {role!r} is unknown; known are {', '.join(ROLES)}")
    return ROLES[role], _text(turn, "content" if "content" in turn else "value")


def _text(row: dict[str, object], key: str) -> str:
    value = row.get(key, "" if key == "input" else None)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be text, got {value!r}")
    value.encode("utf-8")  # A lone surrogate is no text.
    return value


def read_conversations(span: Span, keys: Sequence[str], skip_bad: bool = False) -> Iterator[Batch]:
    """Rendered conversations of a JSONL file, or of one JSON array. Raises BadInputError unless ``skip_bad``."""
    for rows, advance in _rows(span):
        documents, bad = [], []
        for place, raw in rows:
            try:
                documents.append(render(parse_row(json.loads(raw) if isinstance(raw, bytes) else raw)))
            except (ValueError, RecursionError) as error:
                bad.append(f"{span.path}:{place}: {error}")
        if bad and not skip_bad:
            raise BadInputError(f"{bad[0]}; repair it, or count and skip such rows with --skip-bad-lines")
        yield Batch({keys[0]: documents}, advance, bad)


def _rows(span: Span) -> Iterator[tuple[list[tuple[int, object]], int]]:
    """(line or item number, raw row) in batches, and how far each batch advanced in the file."""
    if is_json_array(span.path):
        with open(span.path, encoding="utf-8") as file:
            try:
                items = json.load(file)
            except ValueError as error:
                raise BadInputError(f"{span.path} is no JSON array: {error}") from error
        for start in range(0, len(items), ROWS_PER_BATCH):
            rows = list(enumerate(items[start : start + ROWS_PER_BATCH], start + 1))
            yield rows, span.end * len(rows) // len(items)
        return
    number = 0
    for block, advance in blocks(span):
        lines = block.split(b"\n")
        yield [(number + i, line) for i, line in enumerate(lines, 1) if line.strip()], advance
        number += len(lines) - 1
