"""What a chat template makes of a prompt, and its tokens: as `tokenizer.apply_chat_template` has them."""

import json
import pickle

import pytest
from chat_templates import DATED, WITH_BEGIN, WITH_SYSTEM, chat_tokenizer
from datasets import Dataset
from tiny import tiny_model

from backbone.plan import LayerPlan
from oracle.chat import ChatError, ChatTemplate, Message, Question, Rendered, rendered, tokens_of
from oracle.decoding import Decoding
from oracle.labels.generation import answer_batch
from oracle.prompts import Prompt, PromptError, load_prompts

USER = {"role": "user", "content": "  one two "}
LONG = [USER, {"role": "assistant", "content": "three"}, {"role": "user", "content": "four"}]
SYSTEM = [{"role": "system", "content": "be short"}, USER]


def template_of(tokenizer) -> ChatTemplate:
    found = ChatTemplate.of_tokenizer(tokenizer)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("template", "turns"), [(WITH_BEGIN, [USER]), (WITH_BEGIN, LONG), (WITH_SYSTEM, LONG), (WITH_SYSTEM, SYSTEM)]
)
def test_tokens_are_those_of_apply_chat_template(template, turns) -> None:
    tokenizer = chat_tokenizer(template)
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    text = rendered(Question.of(turns), template_of(tokenizer))
    assert tokens_of(tokenizer, text) == expected
    assert expected.count(tokenizer.bos_token_id) == (template == WITH_BEGIN)


def test_a_text_is_what_the_user_says_unless_it_is_raw() -> None:
    tokenizer = chat_tokenizer()
    template = template_of(tokenizer)
    as_user = rendered(Question.of("one"), template)
    assert as_user == rendered(Question.of([{"role": "user", "content": "one"}]), template)
    assert as_user == "<bos>[user]one;[assistant]"
    assert rendered(Question.of("one", raw=True), template) == rendered(Question.of("one"), None) == "one"
    assert tokens_of(tokenizer, "one") == tokenizer("one").input_ids


def test_the_beginning_token_never_comes_twice() -> None:
    tokenizer = chat_tokenizer()
    text = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert tokenizer(text).input_ids[:2] == [tokenizer.bos_token_id] * 2, "what is to be avoided"
    for given in (text, Rendered(text)):
        assert tokens_of(tokenizer, given).count(tokenizer.bos_token_id) == 1


def test_a_rendered_text_stays_one_on_its_way_to_another_process() -> None:
    arrived, tokenizer = pickle.loads(pickle.dumps(Rendered("abc"))), chat_tokenizer()
    assert tokens_of(tokenizer, arrived) == tokenizer("abc").input_ids[1:]


def test_labelling_answers_what_stock_generate_answers() -> None:
    tokenizer, model = chat_tokenizer(), tiny_model("llama")
    inputs = tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    text = rendered(Question.of([USER]), template_of(tokenizer))
    (answer,) = answer_batch(model, tokenizer, [text], LayerPlan.full(6), Decoding(5))
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.token_ids == expected[answer.prompt_tokens :].tolist()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the prompt is missing; give prompt, a text, or messages"),
        ({"prompt": "a", "messages": [USER]}, "prompt and messages are both given; leave one of them out"),
        ({"prompt": ["a"]}, r"the prompt should be a text, got \['a'\]"),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a", "raw": "yes"}, "raw should be true or false, got 'yes'"),
        ({"messages": [USER], "raw": True}, "raw goes with prompt"),
        ({"messages": "a"}, "messages should be a list of turns, got 'a'"),
        ({"messages": {"role": "user"}}, "messages should be a list of turns"),
        ({"messages": []}, "messages is empty"),
        ({"messages": ["a"]}, "turn 1 should hold role and content, both texts, got 'a'"),
        ({"messages": [USER, {"role": "user"}]}, "turn 2 should hold role and content"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "turn 1 should hold role and content"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "turn 1 has the role 'bot'; roles are system, user, assist"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, r"turn 1 has the role \['user'\]"),
        ({"messages": [{**USER, "tool_calls": [1]}]}, "turn 1 holds 'tool_calls', which is not supported"),
        ({"messages": [{"role": "user", "content": "\n"}]}, "turn 1 is empty"),
        ({"messages": LONG[:2]}, "the last turn is the assistant's; it should be the user's"),
    ],
)
def test_what_is_no_question_is_said_in_one_sentence(row, message) -> None:
    with pytest.raises(ChatError, match=message):
        Question.of_row(row)


def test_a_question_survives_its_row() -> None:
    for question in (Question.of("a"), Question.of("a", raw=True), Question.of(LONG)):
        assert Question.of_row(json.loads(json.dumps(question.to_row()))) == question


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% if %}", "cannot render it: Expected an expression"),
        (b"{{ raise_exception('only in pairs') }}", "cannot render it: only in pairs"),
        (b"{{ messages[0].content.upper(1, 2, 3) }}", "cannot render it: "),
        (b"{{ ''.__class__.__mro__ }}", "cannot render it: access to attribute '__class__'"),
        (b"Hello!", "never shows what the user says"),
        (b"\xff\xfe", "it is not UTF-8"),
        (None, r"cannot read the chat template .*chat.jinja .No such file or directory"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tmp_path, content, message) -> None:
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ChatError, match=message):
        ChatTemplate.of_file(path, {})


def test_messages_need_a_template() -> None:
    with pytest.raises(ChatError, match="messages need a chat template, and there is none"):
        rendered(Question.of([USER]), None)
    prompt = Prompt("p1", "t", "", "", "exact", messages=(Message("user", "a"),))
    with pytest.raises(PromptError, match="the prompt 'p1': messages need a chat template"):
        prompt.rendered(None)
    with pytest.raises(PromptError, match=r"the prompt 'p1': the chat template .* System role not supported"):
        Prompt("p1", "t", "", "", "exact", Question.of(SYSTEM).messages).rendered(ChatTemplate(WITH_BEGIN))


def test_of_several_templates_the_default_is_taken() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": WITH_SYSTEM, "tool_use": WITH_BEGIN}
    assert template_of(tokenizer).text == WITH_SYSTEM
    tokenizer.chat_template = {"one": WITH_SYSTEM, "two": WITH_BEGIN}
    with pytest.raises(ChatError, match=r"the tokenizer's chat templates cannot be used: .*no default"):
        ChatTemplate.of_tokenizer(tokenizer)


def test_hashes_tell_templates_apart_and_not_days() -> None:
    prompt, tokens = Prompt("p", "t", "one", "two", "exact"), {"bos_token": "<bos>"}
    old = prompt.hash
    assert prompt.rendered(None).hash == old, "labels of prompts without a template stay valid"
    hashes = {prompt.rendered(ChatTemplate(text, tokens)).hash for text in (WITH_BEGIN, WITH_SYSTEM, DATED)}
    assert len(hashes | {old}) == 4
    assert ChatTemplate(WITH_BEGIN, tokens).hash != ChatTemplate(WITH_BEGIN, {"bos_token": "<s>"}).hash
    first, second = (prompt.rendered(ChatTemplate(DATED, tokens)) for _ in range(2))
    assert first.prompt != second.prompt
    assert first.hash == second.hash
    assert first.shown == "one"


ROW = {"id": "a", "task": "t", "reference": "2", "judge": "number"}


def test_prompts_and_conversations_lie_in_one_file(tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"messages": SYSTEM},
        {"id": "b", "prompt": "1"},
        {"id": "c", "prompt": "2", "raw": True},
    ]
    path.write_text("".join(json.dumps({**ROW, **row}) + "\n" for row in rows))
    found = [prompt.rendered(ChatTemplate(WITH_SYSTEM)) for prompt in load_prompts(str(path))]
    assert [prompt.prompt for prompt in found] == [
        "<system>be short;<user>  one two ;<assistant>",
        "<system>be kind;<user>1;<assistant>",
        "2",
    ]
    assert [bool(prompt.template) for prompt in found] == [True, True, False]


def test_a_data_set_has_conversations_in_a_column(tmp_path) -> None:
    columns = {"chat": [SYSTEM, LONG], "prompt": ["1", "2"], "answer": ["a", "b"], "messages": [LONG, LONG]}
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "data.parquet"))
    named = {"messages": "chat", "reference": "answer"}
    prompts = load_prompts(str(tmp_path), columns=named, judge="exact")
    assert [[turn.content for turn in prompt.messages] for prompt in prompts] == [
        ["be short", "  one two "],
        ["  one two ", "three", "four"],
    ]
    with pytest.raises(PromptError, match="has 2 problems: row 1: prompt and messages are both given"):
        load_prompts(str(tmp_path), columns={"reference": "answer"}, judge="exact")
