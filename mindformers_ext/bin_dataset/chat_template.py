"""A model's chat template, rendered by Jinja in a sandbox, and which characters of a conversation the assistant wrote.

The environment is the one that transformers renders templates in: blocks are trimmed, `{% break %}` works, `tojson`
writes plain JSON, `raise_exception` and `strftime_now` are there. A template says what an assistant writes with
`{% generation %}`. DeepSeek's and Moonshot's do not, so a turn of theirs is what the whole has after the prompt that
would ask for it (`add_generation_prompt`), up to where the conversation ends with that turn.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mindformers_ext.bin_dataset.tokenizer_files import TokenizerError, config_of

# DeepSeek-V3's, without tools and with system texts apart; it is taken where a tokenizer comes without a template.
DEEPSEEK_V3 = (
    "{{ bos_token }}{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
DEEPSEEK_TOKENS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
NEEDED = (*DEEPSEEK_TOKENS.values(), "<｜User｜>", "<｜Assistant｜>")
_MARK = f"\0{secrets.token_hex(8)}\0"  # stands at both ends of what the assistant wrote; no text can know it

Message = dict[str, object]


class Rendered(NamedTuple):
    """A conversation as text, and the characters [start, end) that are to be learnt."""

    text: str
    learnt: list[tuple[int, int]]


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(caller: jinja2.runtime.Macro) -> str:
        return f"{_MARK}{caller()}{_MARK}"


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, **how: object) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


class ChatTemplate:
    """``variables`` are more of what the template reads: the names of special tokens, `thinking`, ..."""

    def __init__(self, source: str, variables: Mapping[str, object]) -> None:
        self.source = source
        self.variables = dict(variables)

    @classmethod
    def of(cls, tokenizer: Path, source: str | os.PathLike | None = None, **variables: object) -> ChatTemplate:
        """The template of a file, or the one that a tokenizer comes with, or DeepSeek-V3's."""
        config = config_of(tokenizer)
        tokens = {key: _token_text(value) for key, value in config.items() if key.endswith("_token")}
        beside = tokenizer.with_name("chat_template.jinja")
        if source is not None or beside.is_file():
            return cls(Path(source or beside).read_text(encoding="utf-8"), {**tokens, **variables})
        template = config.get("chat_template")
        if isinstance(template, list):
            template = {item["name"]: item["template"] for item in template}.get("default")
        if template is None:
            return cls(DEEPSEEK_V3, {**DEEPSEEK_TOKENS, **variables})
        return cls(template, {**tokens, **variables})

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": datetime.now().strftime}
        try:
            return environment.from_string(self.source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template cannot be read: {error}") from error

    def reads(self, key: str) -> bool:
        """Whether the template mentions a key of messages, a role or a variable."""
        return re.search(rf"\b{re.escape(key)}\b", self.source) is not None

    def _text(self, messages: Sequence[Message], tools: list[object] | None, prompt: bool = False) -> str:
        try:
            return self._template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **self.variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template cannot render it: {error}") from error

    def render(
        self, messages: Sequence[Message], learnt: Sequence[bool], tools: list[object] | None = None
    ) -> Rendered:
        """The text of a conversation; ``learnt`` says of each message whether it is learnt (an assistant's only)."""
        marked = self._text(messages, tools)
        parts = marked.split(_MARK)
        text = "".join(parts)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(parts) > 1:
            ends = [sum(map(len, parts[:i])) for i in range(1, len(parts))]
            spans = list(zip(ends[::2], ends[1::2], strict=True))
            if len(spans) != len(turns):
                raise ValueError(f"the chat template marks {len(spans)} generations in {len(turns)} assistant turns")
            return Rendered(text, [span for span, i in zip(spans, turns, strict=True) if learnt[i]])
        return Rendered(text, [self._span(text, messages, i, tools) for i in turns if learnt[i]])

    def _span(self, text: str, messages: Sequence[Message], turn: int, tools: list[object] | None) -> tuple[int, int]:
        """Where one turn of the assistant stands in the whole, for a template that does not say so."""
        asked = self._text(messages[:turn], tools, prompt=True)
        start = _common(text, asked)
        if start < len(asked):
            # The prompt goes on otherwise than the answer (R1's opens <think>): they part at a special token.
            ends = [match.end() for match in re.finditer(r"<[|｜].*?[|｜]>", text[:start])]
            start = ends[-1] if ends else start
        end = _common(text, self._text(messages[: turn + 1], tools)) if turn + 1 < len(messages) else len(text)
        if end <= start:
            raise ValueError(
                f"the chat template writes turn {turn + 1} otherwise once others follow; keep the last turn"
            )
        return start, end


def _common(one: str, other: str) -> int:
    """Characters that two texts have in common at their beginning."""
    if one.startswith(other):
        return len(other)
    return len(os.path.commonprefix((one, other)))


def _token_text(value: object) -> str | None:
    return value.get("content") if isinstance(value, dict) else value
