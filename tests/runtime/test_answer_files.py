"""Where answers may be written: nobody's file is replaced unasked, and only our own unfinished one is gone on with."""

import json
import os
import resource
import signal
import socket
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import layerbudget, ran, refused, snapshot
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import make_allocator

from backbone.errors import InputError
from backbone.files import lock_of
from backbone.loading import load_backbone
from controller.models.mlp import MLPController
from oracle.decoding import Decoding
from oracle.prompts import PromptError
from runtime.answer_files import answer_file

LINE = b'{"layerbudget_answers": "0"}\n{"id": "p0", "prompt": "a", "answer": 5}\n'
ROWS = [{"id": f"p{i}", "prompt": "abcdefgh"[: i + 1]} for i in range(6)]


@pytest.fixture(scope="module")
def allocator(plain):
    return replace(plain, decoding=Decoding(3))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prompts(tmp_path):
    return write(tmp_path / "prompts.jsonl", ROWS)


def answer(allocator, model, prompts, out, **options) -> None:
    answer_file(allocator, model, tiny_tokenizer(), prompts, out, batch_size=2, **options)


def at_out(make):
    """The place `out.jsonl`, once something is there."""

    def place(folder):
        make(folder / "out.jsonl")
        return folder / "out.jsonl"

    return place


def linked(out) -> None:
    out.with_name("target.jsonl").write_text("mine")
    out.symlink_to("target.jsonl")


PLACES = {
    "the prompts": (lambda folder: folder / "prompts.jsonl", "is the file of prompts itself"),
    "another spelling": (lambda folder: folder / ".." / folder.name / "prompts.jsonl", "is the file of prompts itself"),
    "hard link": (at_out(lambda out: os.link(out.with_name("prompts.jsonl"), out)), "is the file of prompts itself"),
    "symbolic link": (at_out(linked), "is a symbolic link"),
    "dangling link": (at_out(lambda out: out.symlink_to("nowhere")), "is a symbolic link"),
    "pipe": (at_out(os.mkfifo), "is no regular file"),
    "socket": (at_out(lambda out: socket.socket(socket.AF_UNIX).bind(str(out))), "is no regular file"),
    "folder": (at_out(Path.mkdir), "is no regular file"),
    "device": (lambda folder: Path("/dev/null"), "is no regular file"),
    "missing folder": (lambda folder: folder / "none" / "out.jsonl", "cannot be written"),
    "partial": (at_out(lambda out: os.link(out.with_name("prompts.jsonl"), f"{out}.partial")), "is not layerbudget's"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", PLACES)
def test_what_must_not_be_replaced_is_refused_before_anything_is_loaded(prompts, name, overwrite) -> None:
    place, message = PLACES[name]
    out = place(prompts.parent)
    files = snapshot(prompts.parent)
    flags = ["--overwrite"] if overwrite else []
    # There is no such allocator, and it is not missed: places are looked at first.
    found = refused("generate", "--allocator", "no-such", "--prompts", prompts, "--out", out, *flags)
    assert message in found
    assert snapshot(prompts.parent) == files


def test_an_existing_file_takes_a_word(allocator, model, prompts) -> None:
    out = prompts.with_name("out.jsonl")
    out.write_text("mine")
    with pytest.raises(InputError, match="add --overwrite to replace it"):
        answer(allocator, model, prompts, out)
    assert out.read_text() == "mine"
    answer(allocator, model, prompts, out, overwrite=True)
    assert len(out.read_text().splitlines()) == len(ROWS)


def test_a_file_that_appears_meanwhile_takes_a_word_too(allocator, model, prompts) -> None:
    out = prompts.with_name("out.jsonl")
    with pytest.raises(InputError, match="exists already"):
        answer(allocator, model, prompts, out, advance=lambda count: out.write_text("somebody's"))
    assert out.read_text() == "somebody's"
    done = []
    answer(allocator, model, prompts, out, overwrite=True, advance=done.append)
    assert done == [], "what was answered before is kept"
    assert len(out.read_text().splitlines()) == len(ROWS)


@pytest.mark.parametrize(
    "flags", [["abc", "--out", "out.jsonl"], ["abc", "--overwrite"], ["--prompts", "p", "--overwrite"]]
)
def test_flags_that_would_do_nothing_are_refused(tmp_path, monkeypatch, flags) -> None:
    monkeypatch.chdir(tmp_path)
    done = layerbudget("generate", "--allocator", "no-such", *flags)
    assert done.returncode == 2
    assert "goes with" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_too_long_for_the_disk_is_said_first(prompts, length) -> None:
    out = prompts.with_name("o" * length)
    assert "file name too long" in refused("generate", "--allocator", "no-such", "--prompts", prompts, "--out", out)
    assert [path.name for path in prompts.parent.iterdir()] == [prompts.name]


@contextmanager
def files_up_to(size: int):
    """What a full disk looks like: no file grows beyond so many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_after_a_full_disk_the_same_command_goes_on(model_folder, tmp_path, prompts) -> None:
    write(prompts, [{"id": f"p{i}", "prompt": "abcdefgh"[: 1 + i % 8] * 20} for i in range(30)])
    model, _ = load_backbone(str(model_folder), device="cpu")
    made = replace(make_allocator(model), decoding=Decoding(3), model_source=str(model_folder))
    made.save_pretrained(tmp_path / "allocator")
    files = ("--allocator", tmp_path / "allocator", "--prompts", prompts)
    command = ("generate", *files, "--batch-size", 2, "--device", "cpu")
    ran(*command, "--out", tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    with files_up_to(4096):
        assert "file too large" in refused(*command, "--out", out)
    assert not out.exists()
    begun = (tmp_path / "out.jsonl.partial").read_bytes()
    assert begun.count(b"\n") > 2
    ran(*command, "--out", out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in tmp_path.glob("*out*")} == {"out.jsonl"}


def test_other_files_beside_it_stay(allocator, model, prompts) -> None:
    for name in ("out.jsonl.new", ".out.jsonl.new", "out.jsonl.lock", ".out.jsonl.unfinished"):
        prompts.with_name(name).write_text("mine")
    before = snapshot(prompts.parent)
    answer(allocator, model, prompts, prompts.with_name("out.jsonl"))
    after = snapshot(prompts.parent)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"out.jsonl"}


@pytest.mark.parametrize(
    "content", [b"mine\n", b"{}\n", b"[1]\n", b"\xff\xfe\n", b"mine", b"[" * 100_000 + b"\n", LINE]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_partial_file_is_not_touched(allocator, model, prompts, content, overwrite) -> None:
    partial = prompts.with_name("out.jsonl.partial")
    partial.write_bytes(content)
    with pytest.raises(InputError, match="not layerbudget's"):
        answer(allocator, model, prompts, prompts.with_name("out.jsonl"), overwrite=overwrite)
    assert partial.read_bytes() == content


class Stop(Exception):  # noqa: N818
    pass


def begun(allocator, model, prompts) -> None:
    """A run that stops after its first batch."""

    def stop(count: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        answer(allocator, model, prompts, prompts.with_name("out.jsonl"), advance=stop)


@pytest.mark.parametrize("other", ["controller", "decoding", "dtype"])
def test_answers_of_other_settings_are_not_mixed_in(allocator, model, prompts, other) -> None:
    begun(allocator, model, prompts)
    out, used = prompts.with_name("out.jsonl"), model
    if other == "controller":  # of the same price
        retrained = make_allocator(model, controller=MLPController(epochs=2, hidden=16))
        assert retrained.certificate == allocator.certificate
        allocator = replace(retrained, decoding=Decoding(3))
    elif other == "decoding":
        allocator = replace(allocator, decoding=Decoding(2))
    else:
        used = tiny_model("llama").to(torch.bfloat16)
    with pytest.raises(InputError, match=r"out\.jsonl\.partial was begun with another allocator or other settings"):
        answer(allocator, used, prompts, out)
    answer(allocator, used, prompts, out, overwrite=True)
    assert len(out.read_text().splitlines()) == len(ROWS)


def test_the_same_allocator_loaded_again_goes_on(allocator, model, prompts) -> None:
    begun(allocator, model, prompts)
    allocator.save_pretrained(prompts.parent / "saved")
    counts = []
    again = type(allocator).from_pretrained(prompts.parent / "saved")
    out = prompts.with_name("out.jsonl")
    answer(again, model, prompts, out, overwrite=True, begin=lambda *numbers: counts.append(numbers))
    assert counts == [(2, len(ROWS))]


def test_a_second_process_is_told_to_wait(allocator, model, prompts) -> None:
    out = prompts.with_name("out.jsonl")
    with lock_of(out), pytest.raises(InputError, match="another process is writing"):
        answer(allocator, model, prompts, out)


def test_prompts_too_long_for_the_model_are_named_first(allocator, model, prompts) -> None:
    write(prompts, [*ROWS, {"id": "long", "prompt": "a" * 254}])
    out = prompts.with_name("out.jsonl")
    with pytest.raises(PromptError, match=r"'long' has 254 tokens, which with 3 new ones is more than the 256"):
        answer(allocator, model, prompts, out)
    assert not list(prompts.parent.glob("out*"))
    with pytest.raises(PromptError, match="'p0' has 1 tokens, which with 1000 new ones"):
        answer(replace(allocator, decoding=Decoding(1000)), model, prompts, out)
