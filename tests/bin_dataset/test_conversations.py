"""What conversations become: every key of the formats is used or refused by its name."""

import json

import pytest

from mindformers_ext.bin_dataset.chat_template import DEEPSEEK_TOKENS, DEEPSEEK_V3, NEEDED, ChatTemplate
from mindformers_ext.bin_dataset.conversations import parse_row, read_conversations, render
from mindformers_ext.bin_dataset.text_sources import BadInputError, Span

BOS, EOS, USER, ASSISTANT = NEEDED
TEMPLATE = {"source": DEEPSEEK_V3, "variables": DEEPSEEK_TOKENS}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def pieces(text, spans):
    """The text cut where what is learnt begins and ends."""
    cuts = [0, *(cut for span in spans for cut in span)]
    assert cuts[-1] == len(text)
    return [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]


def segments(row, ignored=()):
    template = ChatTemplate(**TEMPLATE)
    return pieces(*render(parse_row(row, template, ignored), template))


def with_last(**keys):
    """TURNS with more keys in the last turn."""
    return {"messages": [TURNS[0], {**TURNS[1], **keys}]}


USED = {
    "system of messages": ({"system": "S", "messages": TURNS}, [f"{BOS}S{USER}q{ASSISTANT}", f"a{EOS}"]),
    "system of ShareGPT": (
        {"system": "S", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [f"{BOS}S{USER}q{ASSISTANT}", f"a{EOS}"],
    ),
    "system and history of Alpaca": (
        {"instruction": "q", "input": "more", "output": "a", "system": "S", "history": [["q0", "a0"]]},
        [f"{BOS}S{USER}q0{ASSISTANT}", f"a0{EOS}", f"{USER}q\nmore{ASSISTANT}", f"a{EOS}"],
    ),
    "an answer that is not learnt": (
        {"messages": [TURNS[0], {"role": "assistant", "content": "bad", "weight": 0}, *TURNS]},
        [f"{BOS}{USER}q{ASSISTANT}bad{EOS}{USER}q{ASSISTANT}", f"a{EOS}"],
    ),
    "loss false": (
        {"messages": [TURNS[0], {"role": "assistant", "content": "bad", "loss": False}, *TURNS]},
        [f"{BOS}{USER}q{ASSISTANT}bad{EOS}{USER}q{ASSISTANT}", f"a{EOS}"],
    ),
    "keys that hold nothing": (
        {"tools": "[]", "id": 7, "system": None, **with_last(tool_calls=None, name="", weight=1)},
        [f"{BOS}{USER}q{ASSISTANT}", f"a{EOS}"],
    ),
}


@pytest.mark.parametrize("kind", USED)
def test_key_is_used(kind):
    row, expected = USED[kind]
    assert segments(row) == expected


REFUSED = {
    "tools": ({"tools": [{"name": "f"}], "messages": TURNS}, "key 'tools' of the row"),
    "tools as text": ({"tools": '[{"name": "f"}]', "messages": TURNS}, "key 'tools' of the row"),
    "history beside messages": ({"history": [["q", "a"]], "messages": TURNS}, "key 'history' of the row"),
    "two lists of turns": ({"messages": TURNS, "conversations": TURNS}, "key 'conversations' of the row"),
    "messages beside Alpaca": ({"instruction": "q", "output": "a", "messages": TURNS}, "key 'messages' of the row"),
    "tool calls": (with_last(content=None, tool_calls=[{"id": 1}]), "key 'tool_calls' of a turn"),
    "reasoning": (with_last(reasoning_content="I think"), "key 'reasoning_content' of a turn"),
    "a name": (with_last(name="Ann"), "key 'name' of a turn"),
    "half a weight": (with_last(weight=0.5), "'weight' must be 0 or 1"),
    "weight NaN": (with_last(weight=float("nan")), "'weight' must be 0 or 1"),
    "weight as text": (with_last(weight="0"), "'weight' must be 0 or 1"),
    "contradiction": (with_last(weight=0, loss=True), "contradict each other"),
    "a learnt question": ({"messages": [{**TURNS[0], "loss": True}, TURNS[1]]}, "only an assistant's words"),
    "nothing learnt": (with_last(weight=0), "no message of an assistant"),
    "two contents": (with_last(value="b"), "both 'content' and 'value'"),
    "two roles": (with_last(**{"from": "human"}), "both 'role' and 'from'"),
    "no role": ({"messages": [{"content": "a"}]}, "a turn has no 'role'"),
    "role of another kind": ({"messages": [{"role": [], "content": "a"}]}, r"role \[\] is unknown"),
    "two system texts": (
        {"system": "S", "messages": [{"role": "system", "content": "T"}, *TURNS]},
        "system text in the row's 'system' and",
    ),
    "system of another kind": ({"system": 3, "messages": TURNS}, "'system' must be text, got '3'"),
    "history of another kind": (
        {"instruction": "q", "output": "a", "history": [["q"]]},
        r"'history' must be a list of \[question, answer\]",
    ),
    "history without text": ({"instruction": "q", "output": "a", "history": [["q", 3]]}, "'history' must be text"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_key_is_refused_by_name(kind):
    row, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        segments(row)


def test_keys_that_the_user_says_mean_nothing():
    row = {**with_last(score=3), "origin": "web"}
    with pytest.raises(ValueError, match="--ignore-keys origin"):
        segments(row, ["score"])
    assert segments(row, ["score", "origin"]) == [f"{BOS}{USER}q{ASSISTANT}", f"a{EOS}"]


def read(path, start=0):
    span = Span(str(path), start, path.stat().st_size)
    batches = list(read_conversations(span, ["text"], template=TEMPLATE))
    return [pieces(*item) for batch in batches for item in zip(batch.texts["text"], batch.learnt, strict=True)]


def test_every_form_of_file_gives_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"system": "S", "messages": TURNS}, with_last(weight=1)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = [segments(row) for row in rows]
    assert [read(tmp_path / name) for name in ("a.jsonl", "a.json", "a.parquet")] == [expected] * 3


def test_a_bad_row_is_named_by_its_line_in_any_part_of_the_file(tmp_path):
    good = json.dumps({"messages": TURNS}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * 3 + json.dumps({"messages": TURNS, "tools": [1]}) + "\n")
    for start in (0, 2 * len(good)):
        with pytest.raises(BadInputError, match=r"a\.jsonl:4: key 'tools'"):
            read(tmp_path / "a.jsonl", start)
