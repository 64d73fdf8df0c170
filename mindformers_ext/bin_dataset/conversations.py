"""Instruction data: Alpaca, ShareGPT and OpenAI's messages to a chat template's text and what of it is learnt.

Every format becomes messages as OpenAI writes them, which the template reads. A key or a role that holds something and
that the template does not mention is refused by its name: the model would train without what it says.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from mindformers_ext.bin_dataset.chat_template import ChatTemplate, Message, Rendered
from mindformers_ext.bin_dataset.text_sources import (
    BadInputError,
    Batch,
    Span,
    blocks,
    is_json_array,
    is_table,
    lines_before,
    table_batches,
)
from mindformers_ext.files import remote

# ShareGPT's and older words for OpenAI's roles.
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
ROWS_PER_BATCH = 1000
LEARN = ("all", "last")  # what of a conversation is learnt: every assistant turn, or the last one

# What the keys of a row and of a turn mean here, besides what the template reads.
ALPACA_KEYS = {"instruction", "input", "output", "system", "history"}
TURN_LISTS = ("messages", "conversations")
TURN_KEYS = {"role", "from", "content", "value", "weight", "loss"}
TOOL_KEYS = {"tool_call_id", "name"}  # a tool's answer stands after its call: no template needs them to read it
LABELS = {"id", "idx", "index", "uuid", "conversation_id", "source", "dataset", "category", "lang", "language"}


class Conversation(NamedTuple):
    """Messages in OpenAI's form, whether each is learnt (counts for an assistant's), and the tools there are."""

    messages: list[Message]
    learnt: list[bool]
    tools: list[object] | None = None


def render(conversation: Conversation, template: ChatTemplate, learn: str = "all") -> Rendered:
    """Text and learnt characters; a last prompt without an answer is left out.

    Raises ValueError if nothing is learnt.
    """
    messages, learnt, tools = conversation
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = answers[-1:] if learn == "last" else answers
    learnt = [i in answers and is_learnt for i, is_learnt in enumerate(learnt)]
    if not any(learnt):
        raise ValueError("no message of an assistant to learn from")
    rendered = template.render(messages[: answers[-1] + 1], learnt[: answers[-1] + 1], tools)
    if not any(end > start for start, end in rendered.learnt):
        raise ValueError("no message of an assistant to learn from: the chat template writes nothing of them")
    return rendered


def parse_row(row: object, template: ChatTemplate, ignored: Collection[str] = ()) -> Conversation:
    """One conversation: ``messages``, ``conversations`` (ShareGPT) or ``instruction`` (Alpaca).

    ``system`` is the system text of any of them; ``history``, pairs of question and answer before an Alpaca
    instruction, is learnt like the rest. ``ignored`` are keys of rows and turns that the user says mean nothing.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} where a conversation object is needed")
    if "instruction" in row:
        _check_keys(row, ALPACA_KEYS, ignored, "the row")
        question, more, answer = (_text(row, key) for key in ("instruction", "input", "output"))
        last = [_message("user", f"{question}\n{more}" if more else question), _message("assistant", answer)]
        messages = [*_system(row), *_history(row), *last]
        return Conversation(messages, [True] * len(messages))
    name = next((key for key in TURN_LISTS if isinstance(row.get(key), list)), None)
    if name is None:
        raise ValueError(f"no messages, conversations or instruction, only {list(row)[:8]}")
    _check_keys(row, {name, "system", *(["tools"] if template.reads("tools") else [])}, ignored, "the row")
    turns = [_turn(turn, template, ignored) for turn in row[name]]
    system = _system(row)
    if system and any(message["role"] == "system" for message, _ in turns):
        raise ValueError(f"a system text in the row's 'system' and in its {name!r}; keep one of them")
    messages = [*system, *(message for message, _ in turns)]
    return Conversation(messages, [True] * len(system) + [learnt for _, learnt in turns], _tools(row))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _tools(row: Mapping[str, object]) -> list[object] | None:
    """The row's tools; tables keep them as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else None
    if tools and not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list, or its JSON text, got {str(tools)[:60]!r}")
    return tools or None


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


def _system(row: dict[str, object]) -> list[Message]:
    return [] if _is_empty(row.get("system")) else [_message("system", _text(row, "system"))]


def _history(row: dict[str, object]) -> list[Message]:
    pairs = [] if _is_empty(row.get("history")) else row["history"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"'history' must be a list of [question, answer], got {str(pairs)[:60]}")
    said = [text for pair in pairs for text in pair]
    roles = ("user", "assistant") * len(pairs)
    return [_message(role, _text({"history": text}, "history")) for role, text in zip(roles, said, strict=True)]


def _turn(turn: object, template: ChatTemplate, ignored: Collection[str]) -> tuple[Message, bool]:
    """A turn as a message, and whether it is learnt."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is {type(turn).__name__}, not an object")
    name = turn[_one_of(turn, "role", "from")]
    role = ROLES.get(name, name) if isinstance(name, str) else name
    if name == "function_call":
        turn, role = {**turn, "tool_calls": _calls(turn), "content": None, "value": None}, "assistant"
    if not isinstance(role, str) or not role or not template.reads(role):
        raise ValueError(f"role {name!r} is unknown to the chat template; known are those it names, and {list(ROLES)}")
    read = {key for key in turn if key not in TURN_KEYS and template.reads(key)}
    _check_keys(turn, TURN_KEYS | read | (TOOL_KEYS if role == "tool" else set()), ignored, "a turn")
    # Tables give every row all keys: one that holds nothing is one that is absent, as templates ask for it.
    more = {key: _without_nulls(turn[key]) for key in sorted(read) if not _is_empty(turn[key])}
    if more.get("tool_calls") and not turn.get("content") and not turn.get("value"):
        content = None  # as OpenAI writes it, and templates ask for it
    else:
        content = _text(turn, _one_of(turn, "content", "value"))
    return {"role": role, "content": content, **more}, _is_learnt(turn, role)


def _calls(turn: Mapping[str, object]) -> list[object]:
    """ShareGPT's function_call, one call or a list as JSON, in OpenAI's form."""
    calls = json.loads(_text(turn, _one_of(turn, "content", "value")))
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise ValueError("a turn of 'function_call' must hold the JSON of a call with name and arguments")
    texts = [call["arguments"] for call in calls]
    texts = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in texts]
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": text}}
        for call, text in zip(calls, texts, strict=True)
    ]


def _without_nulls(value: object) -> object:
    """A value of a table's row without the keys that other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


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


def _text(row: Mapping[str, object], key: str) -> str:
    """A text, or the texts of OpenAI's list of parts."""
    value = row.get(key)
    value = "" if value is None and key == "input" else value
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(_text(part, "text") for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be text, got {str(value)[:60]!r}")
    value.encode("utf-8")  # A lone surrogate is no text.
    return value


def read_conversations(
    span: Span,
    keys: Sequence[str],
    skip_bad: bool = False,
    template: Mapping[str, object] | None = None,
    learn: str = "all",
    ignored: Collection[str] = (),
) -> Iterator[Batch]:
    """Rendered conversations of a JSONL file, one JSON array or a table. Raises BadInputError unless ``skip_bad``.

    ``template`` has the arguments of ChatTemplate.
    """
    chat = ChatTemplate(**template)
    for rows, advance in _rows(span):
        texts, learnt, bad = [], [], []
        reasoning_left_out = 0
        for place, raw in rows:
            try:
                row = json.loads(raw) if isinstance(raw, bytes) else raw
                conversation = parse_row(row, chat, ignored)
                text, spans = render(conversation, chat, learn)
            except (ValueError, RecursionError) as error:
                bad.append(f"{span.path}:{place + lines_before(span)}: {error}")
                continue
            texts.append(text)
            learnt.append(spans)
            thoughts = (message.get("reasoning_content") for message in conversation.messages)
            reasoning_left_out += sum(bool(thought) and thought.strip() not in text for thought in thoughts)
        if bad and not skip_bad:
            raise BadInputError(f"{bad[0]}; repair it, or count and skip such rows with --skip-bad-lines")
        yield Batch({keys[0]: texts}, advance, bad, learnt, reasoning_left_out)


def _rows(span: Span) -> Iterator[tuple[list[tuple[int, object]], int]]:
    """(line of the span or item, raw row) in batches, and how far each batch advanced in the file."""
    if is_table(span.path):
        number = 0
        for group, advance in table_batches(span):
            yield list(enumerate(group.to_pylist(), number + 1)), advance
            number += len(group)
        return
    if is_json_array(span.path):
        with remote.open_binary(span.path) as file:
            try:
                items = json.loads(file.read().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise BadInputError(f"{span.path} is no JSON array: {error}") from error
        for start in range(0, len(items), ROWS_PER_BATCH):
            rows = list(enumerate(items[start : start + ROWS_PER_BATCH], start + 1))
            yield rows, span.end * len(rows) // len(items)
        return
    for block, advance, before in blocks(span):
        lines = enumerate(block.split(b"\n"), before + 1)
        yield [(number, line) for number, line in lines if line.strip()], advance
