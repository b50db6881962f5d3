"""An allocator renders prompts as its own were, keeps the template, and notices prompts without it."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from chat_templates import DATED, WITH_BEGIN, WITH_SYSTEM, chat_tokenizer
from command import layerbudget, refused
from tiny import tiny_model
from tiny_allocator import GREEDY, make_allocator, resigned

from backbone.errors import ArtefactError, InputError
from oracle.chat import ChatError, ChatTemplate, Rendered, padded_prompts
from oracle.decoding import Decoding
from oracle.prompts import PromptError
from runtime import chat_format
from runtime.allocator import Allocator
from runtime.answer_files import answer_file
from runtime.chat_format import ChatFormat
from runtime.saving.allocator_files import content_digest

TURNS = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}, {"role": "user", "content": "fg"}]


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch) -> None:
    monkeypatch.setattr(chat_format, "_warned", set())


def format_of(template=WITH_BEGIN, **options) -> ChatFormat:
    tokenizer = chat_tokenizer(template)
    return ChatFormat.of(ChatTemplate.of_tokenizer(tokenizer), tokenizer, **options)


def chatty(model, price=None, **options) -> Allocator:
    """An allocator with a template; without a price all run the full plan."""
    return replace(make_allocator(model, price), chat=format_of(**options), decoding=Decoding(6))


def stock(model, tokenizer, turns) -> str:
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, **GREEDY, pad_token_id=0)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_those_of_stock_generate_and_the_tokenizers_own_template(model) -> None:
    allocator, tokenizer = chatty(model), chat_tokenizer()
    expected = [stock(model, tokenizer, turns) for turns in (TURNS[:1], TURNS)]
    assert [text.text for text in allocator.generate_many(model, tokenizer, ["abc", TURNS])] == expected
    already = Rendered(tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True))
    assert allocator.generate_many(model, tokenizer, [already])[0].text == expected[1]
    inputs = allocator.inputs(tokenizer, ["abc", TURNS])
    output = allocator.generate(model, **inputs, **GREEDY, pad_token_id=0)[:, inputs["input_ids"].shape[1] :]
    assert [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)] == expected


def test_without_a_template_prompts_are_given_as_they_are(model) -> None:
    allocator, tokenizer = make_allocator(model), chat_tokenizer()
    assert allocator.rendered(tokenizer, "abc") == "abc"
    assert allocator.inputs(tokenizer, ["abc"])["input_ids"].tolist() == [tokenizer("abc").input_ids]
    with pytest.raises(ChatError, match="messages need a chat template"):
        allocator.rendered(tokenizer, TURNS)
    with pytest.raises(ChatError, match="turn 1 has the role 'bot'"):
        allocator.rendered(tokenizer, [{"role": "bot", "content": "a"}])


@pytest.mark.parametrize("template", [WITH_BEGIN, WITH_SYSTEM, DATED])
def test_what_prompts_begin_and_end_with_does_not_hang_on_what_is_said(template) -> None:
    found, tokenizer = format_of(template), chat_tokenizer(template)
    end = ">" if template == WITH_SYSTEM else "]"
    assert tokenizer.decode(list(found.tail)) == f"ssistant{end}"[-8:]
    assert len(found.head) == (0 if template == DATED else 4), "tomorrow it begins otherwise"
    for content in ("x", "Why?", "\n\n1", "[user]"):
        turns = [{"role": "user", "content": content}]
        ids = torch.tensor([tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]])
        assert found.fits(ids, torch.ones_like(ids)).all()


def test_a_prompt_without_the_template_is_noticed_once(model, caplog) -> None:
    allocator, tokenizer = chatty(model), chat_tokenizer()
    good = allocator.inputs(tokenizer, ["abc", TURNS])
    raw = tokenizer(["abcdefghijklmnopqrstuvw"], return_tensors="pt")
    with caplog.at_level(logging.WARNING):
        allocator.generate(model, **good, **GREEDY, pad_token_id=0)
        model.generate(**good, **GREEDY, custom_generate=allocator, pad_token_id=0)
        assert not caplog.messages
        model.generate(**raw, **GREEDY, custom_generate=allocator)
        allocator.generate(model, **raw, **GREEDY)
    (message,) = caplog.messages
    assert "prompt 0 does not begin with the tokens [1, " in message
    assert "apply_chat_template" in message


@pytest.mark.parametrize("fault", ["no generation prompt", "two begins", "a short one"])
def test_prompts_that_were_put_into_the_template_wrongly_are_noticed_too(model, caplog, fault) -> None:
    allocator, tokenizer = chatty(model), chat_tokenizer()
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=fault != "no generation prompt")
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=fault == "two begins")
    if fault == "a short one":
        inputs = tokenizer("a", return_tensors="pt")
    allocator.allocate(model, **inputs)
    assert "does not begin with" in caplog.text


def test_a_conversation_that_goes_on_from_a_cache_is_not_looked_at_again(model, caplog) -> None:
    allocator, tokenizer = chatty(model), chat_tokenizer()
    first = allocator.generate(
        model, **allocator.inputs(tokenizer, ["abc"]), **GREEDY, return_dict_in_generate=True, pad_token_id=0
    )
    ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    allocator.generate(model, input_ids=ids, cache=first.cache, **GREEDY, pad_token_id=0)
    assert not caplog.messages


def test_where_some_prompts_were_raw_nothing_is_said(model, caplog) -> None:
    allocator = chatty(model, for_all=False)
    assert allocator.chat.head == allocator.chat.tail == ()
    allocator.generate(model, **chat_tokenizer()("abc", return_tensors="pt"), **GREEDY)
    assert not caplog.messages


def test_the_templates_hash_is_saved_and_not_its_text(model, tmp_path) -> None:
    allocator = chatty(model)
    allocator.save_pretrained(tmp_path)
    loaded = Allocator.from_pretrained(tmp_path)
    assert loaded.chat == allocator.chat
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["chat_template"] == allocator.chat.hash == ChatTemplate.of_tokenizer(chat_tokenizer()).hash
    assert not [path.name for path in tmp_path.iterdir() if "{%" in path.read_text(errors="replace")]
    assert content_digest(loaded) == content_digest(allocator) != content_digest(chatty(model, template=WITH_SYSTEM))
    replace(allocator, chat=None).save_pretrained(tmp_path)
    assert Allocator.from_pretrained(tmp_path).chat is None
    assert json.loads((tmp_path / "manifest.json").read_text())["chat_template"] == "none"


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("head"),
        lambda data: data.update(more=1),
        lambda data: data.update(template="{{ messages }}"),
        lambda data: data.update(hash="0" * 16),
        lambda data: data.update(special={str(number): "x" for number in range(65)}),
        lambda data: data.update(head=[1] * 5),
    ],
)
def test_a_format_that_says_something_odd_is_refused(model, tmp_path, change) -> None:
    chatty(model).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "chat.json").read_text())
    change(data)
    (tmp_path / "chat.json").write_text(json.dumps(data))
    resigned(tmp_path)
    with pytest.raises(ArtefactError, match=r"chat.json is not a chat format|its chat template is"):
        Allocator.from_pretrained(tmp_path)


HOSTILE = "{% for a in range(10**9) %}{% for b in range(10**9) %}{{ 10**100000000 }}{% endfor %}{% endfor %}"


def test_no_text_but_the_allocators_own_template_is_rendered(model, tmp_path) -> None:
    """Also of a tokenizer or a file: a hostile one would never end."""
    chatty(model).save_pretrained(tmp_path)
    loaded, path = Allocator.from_pretrained(tmp_path), tmp_path / "chat.jinja"
    for other, message in ((WITH_SYSTEM, "at hand is"), (HOSTILE, "at hand is"), (None, "has no chat template")):
        with pytest.raises(ChatError, match=message):
            loaded.rendered(chat_tokenizer(other), "abc")
        path.write_text(other or "")
        with pytest.raises(ChatError, match=r"chat\.jinja is the chat template \w+, this allocator's prompts are put"):
            Allocator.from_pretrained(tmp_path, chat_template=path)
    path.write_text(WITH_BEGIN)
    given = Allocator.from_pretrained(tmp_path, chat_template=path)
    for tokenizer in (chat_tokenizer(None), chat_tokenizer(HOSTILE)):
        assert given.rendered(tokenizer, TURNS) == loaded.rendered(chat_tokenizer(), TURNS)
        assert loaded.rendered(tokenizer, "abc", raw=True) == "abc"
    make_allocator(model).save_pretrained(tmp_path / "plain")
    with pytest.raises(ChatError, match="was given for an allocator whose prompts are given as they are"):
        Allocator.from_pretrained(tmp_path / "plain", chat_template=path)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_holds_prompts_and_conversations(model, tmp_path) -> None:
    allocator, tokenizer = chatty(model), chat_tokenizer()
    rows = [{"id": "a", "prompt": "abc"}, {"id": "b", "messages": TURNS}, {"prompt": "abc", "raw": True}]
    prompts, out = write(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    answer_file(allocator, model, tokenizer, prompts, out, batch_size=2)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    asked = [{name: line.get(name) for name in ("prompt", "messages", "raw") if name in line} for line in lines]
    assert asked == [{name: row[name] for name in row if name != "id"} for row in rows]
    assert [line["answer"] for line in lines[:2]] == [stock(model, tokenizer, turns) for turns in (TURNS[:1], TURNS)]
    raw = allocator.generate_many(model, tokenizer, ["abc"], raw=True)[0].text
    assert lines[2]["answer"] == raw != lines[0]["answer"]


def test_a_file_that_was_begun_goes_on_also_with_conversations(model, tmp_path) -> None:
    allocator, tokenizer = chatty(model), chat_tokenizer()
    rows = [{"messages": TURNS}, {"prompt": "abc"}, {"prompt": "abcd", "raw": True}]
    prompts, out = write(tmp_path / "prompts.jsonl", rows), tmp_path / "out.jsonl"
    with pytest.raises(InputError):
        answer_file(allocator, model, tokenizer, prompts, out, batch_size=2, advance=lambda done: out.write_text("x"))
    out.unlink()
    done: list[int] = []
    answer_file(allocator, model, tokenizer, prompts, out, batch_size=2, begin=lambda had, total: done.append(had))
    assert done[0] > 0
    assert len(out.read_text().splitlines()) == 3


def test_a_conversation_that_cannot_be_rendered_is_named(model, tmp_path) -> None:
    rows = [{"id": "x", "messages": [{"role": "system", "content": "a"}, *TURNS]}]
    prompts = write(tmp_path / "prompts.jsonl", rows)
    with pytest.raises(PromptError, match=r"the prompt 'x': the chat template .* System role not supported"):
        answer_file(chatty(model), model, chat_tokenizer(), prompts, None, batch_size=2)
    with pytest.raises(PromptError, match="the prompt 'x': messages need a chat template"):
        answer_file(make_allocator(model), model, chat_tokenizer(), prompts, None, batch_size=2)


def test_the_command_line_renders_a_prompt_unless_it_is_raw(tmp_path) -> None:
    model, tokenizer = tiny_model("llama"), chat_tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    allocator = replace(chatty(model), model_source=str(tmp_path / "model"))
    allocator.save_pretrained(tmp_path / "allocator")
    command = ("generate", "--allocator", tmp_path / "allocator", "--device", "cpu", "abc")
    assert f"abc\n  {stock(model, tokenizer, TURNS[:1])}\n" in layerbudget(*command).stdout
    tokenizer.chat_template = HOSTILE  # which no file of the allocator's brings, so that the user must
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "chat.jinja").write_text(WITH_BEGIN)
    assert "the chat template at hand is" in refused(*command)
    assert layerbudget(*command, "--chat-template", tmp_path / "chat.jinja").stdout.count("[") == 1
    raw = model.generate(**padded_prompts(tokenizer, ["abc"]), **GREEDY, pad_token_id=0)[0, 4:]
    text = tokenizer.decode(raw, skip_special_tokens=True).strip()
    assert f"abc\n  {text}\n" in layerbudget(*command, "--raw").stdout
    assert "Template     " + allocator.chat.hash in layerbudget("inspect", tmp_path / "allocator").stdout
    write(tmp_path / "p.jsonl", [{"prompt": "a"}])
    assert layerbudget("generate", "--allocator", "none", "--prompts", tmp_path / "p.jsonl", "--raw").returncode == 2
    assert "the prompt is empty" in refused("generate", "--allocator", tmp_path / "allocator", " ")
