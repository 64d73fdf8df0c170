"""Instruction data through DeepSeek-V3's chat template: Alpaca, ShareGPT and messages files to text with roles.

The template is DeepSeek-V3's: begin of sentence, the system text, and each turn as ``<｜User｜>question`` or
``<｜Assistant｜>answer<｜end▁of▁sentence｜>``. A conversation is a list of segments: by turns a prompt (not
learnt) and the assistant's words with their end mark (learnt). Segments meet at special tokens, where a tokenizer
cuts anyway, so their ids are those of the whole text. There are no tools and no reasoning in it: rows that have them
are refused.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from mindformers_ext.bin_dataset.text_sources import (
    BadInputError,
    Batch,
    Span,
    blocks,
    is_json_array,
    lines_before,
    parquet_batches,
)

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
ROWS_PER_BATCH = 1000

# What the keys of a row and of a turn mean here. Any other key that holds something is refused by its name: it may be
# part of what the model should read (tools, reasoning) or should not learn.
ALPACA_KEYS = {"instruction", "input", "output", "system", "history"}
TURN_LISTS = ("messages", "conversations")
TURN_KEYS = {"role", "from", "content", "value", "weight", "loss"}
LABELS = {"id", "idx", "index", "uuid", "conversation_id", "source", "dataset", "category", "lang", "language"}


class Turn(NamedTuple):
    """What one side says; ``learnt`` counts for an assistant only."""

    role: str  # system, user or assistant
    text: str
    learnt: bool = True


def render(turns: Sequence[Turn]) -> list[str]:
    """Segments of a conversation: prompt, answer, prompt, answer... A last prompt is left out.

    An answer that is not learnt is part of the prompt after it. Raises ValueError if no answer is learnt.
    """
    segments: list[str] = []
    prompt = BOS + "\n\n".join(turn.text for turn in turns if turn.role == "system")
    for role, text, learnt in turns:
        if role == "user":
            prompt += USER + text
        elif role == "assistant" and learnt:
            segments += [prompt + ASSISTANT, text + EOS]
            prompt = ""
        elif role == "assistant":
            prompt += ASSISTANT + text + EOS
    if not segments:
        raise ValueError("no message of an assistant to learn from")
    return segments


def parse_row(row: object, ignored: Collection[str] = ()) -> list[Turn]:
    """Turns of one conversation: ``messages``, ``conversations`` (ShareGPT) or ``instruction`` (Alpaca).

    ``system`` is the system text of any of them; ``history``, pairs of question and answer before an Alpaca
    instruction, is learnt like the rest. ``ignored`` are keys of rows and turns that the user says mean nothing.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} where a conversation object is needed")
    if "instruction" in row:
        _check_keys(row, ALPACA_KEYS, ignored, "the row")
        question, more, answer = (_text(row, key) for key in ("instruction", "input", "output"))
        last = [Turn("user", f"{question}\n{more}" if more else question), Turn("assistant", answer)]
        return [*_system(row), *_history(row), *last]
    name = next((key for key in TURN_LISTS if isinstance(row.get(key), list)), None)
    if name is None:
        raise ValueError(f"no messages, conversations or instruction, only {list(row)[:8]}")
    _check_keys(row, {name, "system"}, ignored, "the row")
    turns = [_turn(turn, ignored) for turn in row[name]]
    system = _system(row)
    if system and any(turn.role == "system" for turn in turns):
        raise ValueError(f"a system text in the row's 'system' and in its {name!r}; keep one of them")
    return [*system, *turns]


def _check_keys(item: dict[str, object], known: Collection[str], ignored: Collection[str], place: str) -> None:
    unknown = [key for key in item if key not in known and key not in LABELS and key not in ignored]
    unknown = [key for key in unknown if not _is_empty(item[key])]
    if unknown:
        raise ValueError(
            f"key {unknown[0]!r} of {place} is not supported (known are {', '.join(sorted(known))}); bring what it "
            f"says into them, or leave it out with --ignore-keys {' '.join(unknown)}"
        )


def _is_empty(value: object) -> bool:
    """Whether a key with this value says no more than one that is absent; tables give every row all keys."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")  # some keep a list (of tools) as its JSON text
    return value is None or value == [] or value == {}


def _system(row: dict[str, object]) -> list[Turn]:
    return [] if _is_empty(row.get("system")) else [Turn("system", _text(row, "system"))]


def _history(row: dict[str, object]) -> list[Turn]:
    pairs = [] if _is_empty(row.get("history")) else row["history"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"'history' must be a list of [question, answer], got {str(pairs)[:60]}")
    said = [text for pair in pairs for text in pair]
    roles = ("user", "assistant") * len(pairs)
    return [Turn(role, _text({"history": text}, "history")) for role, text in zip(roles, said, strict=True)]


def _turn(turn: object, ignored: Collection[str]) -> Turn:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is {type(turn).__name__}, not an object")
    _check_keys(turn, TURN_KEYS, ignored, "a turn")
    role = turn[_one_of(turn, "role", "from")]
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"role {role!r} is unknown; known are {', '.join(ROLES)}")
    text = _text(turn, _one_of(turn, "content", "value"))
    return Turn(ROLES[role], text, _is_learnt(turn, ROLES[role]))


def _one_of(turn: dict[str, object], key: str, other: str) -> str:
    """The one of two names for the same thing that a turn uses."""
    given = [name for name in (key, other) if turn.get(name) is not None]
    if len(given) == 2 and turn[key] != turn[other]:
        raise ValueError(f"a turn has both {key!r} and {other!r}, and they differ")
    if not given:
        raise ValueError(f"a turn has no {key!r}, only {list(turn)[:8]}")
    return given[0]


def _is_learnt(turn: dict[str, object], role: str) -> bool:
    """What ``weight`` (0 or 1) or ``loss`` (false or true) says of a turn; without them, an assistant's is learnt."""
    marks = {key: turn[key] for key in ("weight", "loss") if turn.get(key) is not None}
    for key, mark in marks.items():
        if not isinstance(mark, int | float) or mark not in (0, 1):
            raise ValueError(f"{key!r} must be 0 or 1 (false or true), got {mark!r}: parts of a loss are not supported")
        if mark and role != "assistant":
            raise ValueError(f"{key!r} {mark!r} asks to learn a turn of {role!r}; only an assistant's words are learnt")
    if len(set(map(bool, marks.values()))) > 1:
        raise ValueError(f"a turn's 'weight' {marks['weight']!r} and 'loss' {marks['loss']!r} contradict each other")
    return all(marks.values())


def _text(row: dict[str, object], key: str) -> str:
    value = row.get(key)
    value = "" if value is None and key == "input" else value
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be text, got {str(value)[:60]!r}")
    value.encode("utf-8")  # A lone surrogate is no text.
    return value


def read_conversations(
    span: Span, keys: Sequence[str], skip_bad: bool = False, ignored: Collection[str] = ()
) -> Iterator[Batch]:
    """Rendered conversations of a JSONL file, or of one JSON array. Raises BadInputError unless ``skip_bad``."""
    for rows, advance in _rows(span):
        documents, bad = [], []
        for place, raw in rows:
            try:
                documents.append(render(parse_row(json.loads(raw) if isinstance(raw, bytes) else raw, ignored)))
            except (ValueError, RecursionError) as error:
                bad.append(f"{span.path}:{place + lines_before(span)}: {error}")
        if bad and not skip_bad:
            raise BadInputError(f"{bad[0]}; repair it, or count and skip such rows with --skip-bad-lines")
        yield Batch({keys[0]: documents}, advance, bad)


def _rows(span: Span) -> Iterator[tuple[list[tuple[int, object]], int]]:
    """(line of the span or item, raw row) in batches, and how far each batch advanced in the file."""
    if span.path.endswith(".parquet"):
        number = 0
        for group, advance in parquet_batches(span):
            yield list(enumerate(group.to_pylist(), number + 1)), advance
            number += len(group)
        return
    if is_json_array(span.path):
        with open(span.path, encoding="utf-8-sig") as file:
            try:
                items = json.load(file)
            except (ValueError, RecursionError) as error:
                raise BadInputError(f"{span.path} is no JSON array: {error}") from error
        for start in range(0, len(items), ROWS_PER_BATCH):
            rows = list(enumerate(items[start : start + ROWS_PER_BATCH], start + 1))
            yield rows, span.end * len(rows) // len(items)
        return
    for block, advance, before in blocks(span):
        lines = enumerate(block.split(b"\n"), before + 1)
        yield [(number, line) for number, line in lines if line.strip()], advance
