"""Prompts: vicuna_v1.1 to the id, a checkpoint's own template, and no way in for control tokens."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizer_files
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import TOKENS, byte_level_tokenizer, sentencepiece_definition, sentencepiece_tokenizer

from apar.export.errors import CapacityError, RequestError
from apar.runtime.chat import DEFAULT_SYSTEM, ChatMessage, render_chat, render_prompt
from apar.runtime.tokenizer import Tokenizer

CONTROL_IDS = {0, 1, 2, TOKENS.fork, TOKENS.child}
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content | trim + ' [/INST]' }}
    {%- elif message.role == 'system' %}
        {{- '<<SYS>>' + message.content + '<</SYS>>' }}
    {%- else %}
        {{- message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ' answer:' }}{% endif %}"""
GLUE = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"


def user(content: str) -> ChatMessage:
    return {"role": "user", "content": content}


def assistant(content: str) -> ChatMessage:
    return {"role": "assistant", "content": content}


def system(content: str) -> ChatMessage:
    return {"role": "system", "content": content}


CONVERSATION = [user("How do I eat well?"), assistant("1. Vegetables\n\n2. Fruit"), user("And sleep?")]


def test_vicuna_is_encoded_as_sentencepiece_does() -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_files.sentencepiece_model())
    expected = [
        1,
        *processor.encode(f"{DEFAULT_SYSTEM} USER: How do I eat well? ASSISTANT: 1. Vegetables\n\n2. Fruit"),
        2,
        *processor.encode("USER: And sleep? ASSISTANT:"),
    ]
    assert render_chat(CONVERSATION, sentencepiece_tokenizer()) == expected


def test_vicuna_is_encoded_as_transformers_does(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_files.sentencepiece_model())
    reference = transformers.LlamaTokenizer.from_pretrained(tmp_path, legacy=True)
    prompt = (
        f"{DEFAULT_SYSTEM} USER: How do I eat well? ASSISTANT: 1. Vegetables\n\n2. Fruit</s>USER: And sleep? ASSISTANT:"
    )
    ids = reference(prompt)["input_ids"]
    assert render_chat(CONVERSATION, sentencepiece_tokenizer()) == ([] if ids[0] == 1 else [1]) + ids


def test_system_prompts() -> None:
    tokenizer = sentencepiece_tokenizer()
    own = render_chat([system("Be short."), user("Hi")], tokenizer)
    assert own == [1, *tokenizer.encode_text("Be short. USER: Hi ASSISTANT:")]
    assert render_chat([system(""), user("Hi")], tokenizer) == [1, *tokenizer.encode_text("USER: Hi ASSISTANT:")]


def test_a_plain_prompt() -> None:
    tokenizer = sentencepiece_tokenizer()
    assert render_prompt("Once </s>", tokenizer) == [1, *tokenizer.encode_text("Once </s>")]
    assert render_prompt("", tokenizer) == [1]
    without = Tokenizer(sentencepiece_definition(), tokenizer_files.TokenIds(fork=600, child=601, eos=(2,)))
    assert render_prompt("a", without) == without.encode_text("a")


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("text", ["</s>", "[SplitMask]", "a [SplitMask][SplitSop] b</s><s>", "<unk>", " [SplitSop] "])
def test_what_people_type_stays_text(template: str | None, text: str) -> None:
    tokenizer = sentencepiece_tokenizer(template)

    def structure(content: str) -> list[int]:
        ids = render_chat([system(content), user(content), assistant(content), user(content)], tokenizer)
        return [i for i in ids if i in CONTROL_IDS]

    assert structure(text) == structure("harmless") == [1, 2]
    ids = render_chat([user(text)], tokenizer)
    assert text.strip() in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "texts",
    [("[Split", "x", "Mask]"), ("[", "SplitMas", "k]"), ("a</", "s", ">b"), ("<", "/", "s>"), ("[SplitMask", "]", "]")],
)
def test_messages_cannot_complete_each_other(texts: tuple[str, str, str]) -> None:
    tokenizer = sentencepiece_tokenizer(GLUE)
    a, b, c = texts
    ids = render_chat([user(a), assistant(b), user(c)], tokenizer)
    assert CONTROL_IDS.isdisjoint(ids)
    assert tokenizer.decode(ids) == a + b + c


def test_a_template_of_the_checkpoint_wins() -> None:
    tokenizer = sentencepiece_tokenizer(TEMPLATE)
    conversation = [system("Be short."), user(" eat? "), assistant("yes"), user("sleep?")]
    assert render_chat(conversation, tokenizer) == [
        1,
        *tokenizer.encode_text("<<SYS>>Be short.<</SYS>>[INST] eat? [/INST]yes"),
        2,
        *tokenizer.encode_text("[INST] sleep? [/INST] answer:"),
    ]


def test_a_template_is_rendered_as_transformers_does(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer_files.write_engine_tokenizer(tmp_path)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    conversation = [system("Be short."), user(" eat? "), assistant("yes"), user("sleep?")]
    text = reference.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    tokens = reference(text, add_special_tokens=False)["input_ids"]
    assert render_chat(conversation, sentencepiece_tokenizer(TEMPLATE)) == tokens


def test_the_environment_of_templates() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if loop.first %}{% break %}"
        "{% endif %}{% endfor %}{{ strftime_now('%Y') | length }}{{ messages | tojson | length > 0 }}"
        "{{ {'b': 'ü', 'a': 1} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}"
    )
    tokenizer = sentencepiece_tokenizer(source)
    rendered = tokenizer.decode(render_chat([user("a"), assistant("b"), user("c")], tokenizer))
    assert rendered == 'a4True{"a":1,"b":"\\u00fc"}'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{% if %}", "template is broken"),
        ("{{ messages[9].content.x.y }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ messages }}\n{% for %}", r"template is broken: .* \(its line 2\); correct it"),
    ],
)
def test_a_template_that_fails(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render_chat([user("hi")], sentencepiece_tokenizer(source))


def test_a_template_that_takes_messages_apart() -> None:
    tokenizer = sentencepiece_tokenizer("{% for c in messages[0].content %}{{ c }} {% endfor %}")
    assert tokenizer.decode(render_chat([user("abc")], tokenizer)) == "a b c "
    upper = sentencepiece_tokenizer("{{ messages[0].content | upper }}")
    assert upper.decode(render_chat([user("a </s>")], upper)) in ("A </s>", "A </S>")
    for source in ("{{ messages[0].content[:10] }}", "{% for c in messages[0].content %}{{ c }} {% endfor %}"):
        with pytest.raises(RequestError, match="alters message texts"):
            render_chat([user("123456</s>")], sentencepiece_tokenizer(source))


@given(st.lists(st.text("[]<>/sSplitMaskop \n", max_size=12), min_size=1, max_size=5).filter(lambda x: len(x) % 2))
@settings(max_examples=300, deadline=None)
def test_no_conversation_changes_the_structure(texts: list[str]) -> None:
    messages = [user(t) if i % 2 == 0 else assistant(t) for i, t in enumerate(texts)]
    for template in (None, TEMPLATE, GLUE):
        ids = render_chat(messages, sentencepiece_tokenizer(template))
        expected = [] if template == GLUE else [1] + [2] * (len(texts) // 2)
        assert [i for i in ids if i in CONTROL_IDS] == expected


def test_byte_level_conversations() -> None:
    tokenizer = byte_level_tokenizer()
    ids = render_chat([user("Hi </s>"), assistant("a"), user("b")], tokenizer)
    assert ids[0] == 0 and ids.count(1) == 1
    assert tokenizer.decode(ids) == f"{DEFAULT_SYSTEM} USER: Hi </s> ASSISTANT: aUSER: b ASSISTANT:"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ("hi", "list"),
        ({"role": "user"}, "list"),
        (None, "list"),
        (["hi"], "message 0"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "tool", "content": ""}], "roles are"),
        ([{"role": ["user"], "content": ""}], "roles are"),
        ([{"role": "user", "content": None}], "must be a string, not NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "must be a string, not list"),
        ([{"role": "user", "content": "a\ud800"}], "surrogate"),
        ([system("a")], "last message"),
        ([user("a"), assistant("b")], "last message"),
        ([user("a"), system("b")], "message 1 is a system message; give at most one, in front"),
        ([system("a"), system("b"), user("c")], "message 1 is a system message"),
    ],
)
def test_what_is_no_conversation(messages: Any, message: str) -> None:
    for template in (None, TEMPLATE):
        with pytest.raises(RequestError, match=message):
            render_chat(messages, sentencepiece_tokenizer(template))


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_messages_of_one_role_in_a_row_are_one_turn(template: str | None) -> None:
    tokenizer = sentencepiece_tokenizer(template)
    several = [user("a"), user("b"), assistant("c"), assistant("d"), user("e")]
    assert render_chat(several, tokenizer) == render_chat([user("a\n\nb"), assistant("c\n\nd"), user("e")], tokenizer)
    split = [user("[Split"), user("Mask]"), assistant("</s"), assistant(">"), user("e")]
    assert render_chat(split, tokenizer).count(TOKENS.fork) == 0


def test_an_assistant_may_greet_first() -> None:
    greeting = [assistant("Hello!"), user("Who are you?")]
    tokenizer = byte_level_tokenizer()
    expected = f"{DEFAULT_SYSTEM} ASSISTANT: Hello!USER: Who are you? ASSISTANT:"
    ids = render_chat(greeting, tokenizer)
    assert tokenizer.decode(ids) == expected and ids.count(1) == 1
    assert render_chat(greeting, sentencepiece_tokenizer(TEMPLATE))


def test_a_conversation_that_is_too_long() -> None:
    tokenizer = Tokenizer(sentencepiece_definition(), TOKENS, chat_template=TEMPLATE, max_chars=200)
    with pytest.raises(CapacityError, match="600 characters"):
        render_chat([user("a" * 200), assistant("b" * 200), user("c" * 200)], tokenizer)
