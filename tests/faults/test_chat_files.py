"""The chat template of a run and of an allocator, damaged: used as it stands, or refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from chat_templates import WITH_BEGIN, chat_tokenizer
from damage import DEEP, damages_of
from keys import WAYS, value_damaged
from outcome import must_be_refused
from project import GENERATE, Project
from selection import selected
from test_allocator_files import FLIPS_AND_TEXT, signed

from oracle.chat import ChatTemplate
from runtime.allocator import Allocator
from runtime.chat_format import ChatFormat

ANY = damages_of("chat.json")
VALUES = {f"{key} {way}": value_damaged((key,), way) for key in ("hash", "special", "head", "tail") for way in WAYS}
UNDER_OLD_DIGESTS = [(way, False) for way in ANY]
UNDER_FITTING_DIGESTS = [(way, True) for way in ANY if not way.startswith(FLIPS_AND_TEXT)]
REFUSED = {
    "no end": "{% for turn in messages %}",
    "nothing of the user": "always the same",
    "an exception": "{{ raise_exception('no') }}",
    "an unknown filter": "{{ messages | shout }}",
    "a way out of the sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a number too large": "{{ messages[0].content * 10 ** 12 }}",
    "a division by zero": "{{ messages[0].content ~ 1 // 0 }}",
    "deep": "{{ " + "(" * DEEP + "messages" + ")" * DEEP + " }}",
    "an import": "{% include '/etc/hostname' %}{{ messages[0].content }}",
}
WORDS = (*GENERATE, "--chat-template", "chat.jinja", "abcabc")


@pytest.fixture
def chatty(project) -> Project:
    """The project with an allocator that was made with a template, and the template's file."""
    allocator, tokenizer = Allocator.from_pretrained(project.allocator), chat_tokenizer()
    template = ChatTemplate(WITH_BEGIN, {"bos_token": tokenizer.bos_token})
    replace(allocator, chat=ChatFormat.of(template, tokenizer)).save_pretrained(project.allocator)
    (project.folder / "chat.jinja").write_text(WITH_BEGIN)
    return project


def test_undamaged_it_is_used(chatty) -> None:
    ended = chatty.command(*WORDS)
    assert ended.status == 0, ended.err
    assert "chat.json" in json.loads((chatty.allocator / "manifest.json").read_text())["files"]


@pytest.mark.parametrize(
    ("case", "fitting"),
    [
        *selected(UNDER_OLD_DIGESTS, every=6),
        *selected(UNDER_FITTING_DIGESTS, every=5),
        *selected([(case, True) for case in VALUES], every=11),
    ],
)
def test_a_damaged_format_is_refused(chatty, attempt, case, fitting) -> None:
    {**ANY, **VALUES}[case](chatty.allocator / "chat.json")
    if fitting:
        signed(chatty.allocator)
    attempt(chatty, *WORDS, check=must_be_refused)


@pytest.mark.parametrize("name", selected(list(REFUSED), every=3))
def test_a_template_that_is_none_is_refused_by_a_run(project, attempt, name) -> None:
    (project.folder / "chat.jinja").write_text(REFUSED[name])
    setting = ("--set", "data.chat_template=chat.jinja", "--set", "name=new")
    attempt(project, "menu", "tiny.yaml", *setting, check=must_be_refused)
