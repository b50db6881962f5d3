"""The chat template of a run and of an allocator, damaged: used as it stands, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chat_templates import WITH_BEGIN, chat_tokenizer
from damage import DEEP, damages_of
from keys import WRONG, without, wrong
from outcome import judged
from project import Project
from selection import selected
from test_allocator_files import FLIPS_AND_TEXT, signed

from oracle.chat import ChatTemplate
from runtime.allocator import Allocator
from runtime.chat_format import ChatFormat

KEYS = [(name,) for name in ("hash", "special", "head", "tail")]
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


GENERATE = ("generate", "--allocator", "runs/tiny/allocator", "--chat-template", "chat.jinja", "abcabc")


@pytest.fixture
def chatty(project) -> Project:
    """The project with an allocator that was made with a template, and the template's file."""
    allocator, tokenizer = Allocator.from_pretrained(project.allocator), chat_tokenizer()
    template = ChatTemplate(WITH_BEGIN, {"bos_token": tokenizer.bos_token})
    replace(allocator, chat=ChatFormat.of(template, tokenizer)).save_pretrained(project.allocator)
    (project.folder / "chat.jinja").write_text(WITH_BEGIN)
    return project


def _check(project: Project, limits, expect_good, wrong_if_taken: str | None) -> None:
    foreign = project.foreign
    ended = project.command(*GENERATE, limits=limits)
    expect_good(*judged(ended, project, foreign, lambda: wrong_if_taken))


def test_undamaged_it_is_used(chatty) -> None:
    ended = chatty.command(*GENERATE)
    assert ended.status == 0, ended.err
    assert "chat.json" in json.loads((chatty.allocator / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("damage", selected(list(damages_of("chat.json")), every=6))
def test_a_damaged_format_is_refused(chatty, limits, expect_good, damage) -> None:
    damages_of("chat.json")[damage](chatty.allocator / "chat.json")
    _check(chatty, limits, expect_good, "damage was accepted")


SIGNED = [name for name in damages_of("chat.json") if not name.startswith(FLIPS_AND_TEXT)]


@pytest.mark.parametrize("damage", selected(SIGNED, every=5))
def test_a_damaged_format_under_a_digest_that_fits_is_refused(chatty, limits, expect_good, damage) -> None:
    damages_of("chat.json")[damage](chatty.allocator / "chat.json")
    signed(chatty.allocator)
    _check(chatty, limits, expect_good, "damage was accepted")


@pytest.mark.parametrize(
    ("keys", "what"), selected([(keys, what) for keys in KEYS for what in ("missing", *WRONG)], every=11)
)
def test_a_format_with_a_wrong_value_is_refused(chatty, limits, expect_good, keys, what) -> None:
    (without(keys) if what == "missing" else wrong(keys, WRONG[what]))(chatty.allocator / "chat.json")
    signed(chatty.allocator)
    _check(chatty, limits, expect_good, "a wrong value was accepted")


@pytest.mark.parametrize("name", selected(list(REFUSED), every=3))
def test_a_template_that_is_none_is_refused_by_a_run(project, limits, expect_good, name) -> None:
    path: Path = project.folder / "chat.jinja"
    path.write_text(REFUSED[name])
    foreign = project.foreign
    setting = ("--set", "data.chat_template=chat.jinja", "--set", "name=new")
    ended = project.command("menu", "tiny.yaml", *setting, limits=limits)
    expect_good(*judged(ended, project, foreign, lambda: "it should have been refused"))
