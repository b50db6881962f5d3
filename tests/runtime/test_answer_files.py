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
from command import layerbudget, refused, snapshot
from tiny import tiny_model, tiny_tokenizer
from tiny_allocator import make_allocator

from backbone.errors import InputError
from backbone.files import lock_of
from backbone.loading import load_backbone
from controller.models.mlp import MLPController
from oracle.decoding import Decoding
from oracle.prompts import PromptError
from runtime.answer_files import answer_file, check_places

LINE = b'{"layerbudget_answers": "0"}\n{"id": "p0", "prompt": "a", "answer": 5}\n'
ROWS = [{"id": f"p{i}", "prompt": "abcdefgh"[: i + 1]} for i in range(6)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def allocator(model):
    return replace(make_allocator(model), decoding=Decoding(3))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def answer(allocator, model, prompts, out, **options) -> None:
    answer_file(allocator, model, tiny_tokenizer(), prompts, out, batch_size=2, **options)


def the_prompts(folder):
    return folder / "prompts.jsonl"


def other_spelling(folder):
    (folder / "sub").mkdir()
    return folder / "sub" / ".." / "prompts.jsonl"


def hard_link(folder):
    os.link(folder / "prompts.jsonl", folder / "out.jsonl")
    return folder / "out.jsonl"


def symbolic_link(folder):
    (folder / "target.jsonl").write_text("mine")
    (folder / "out.jsonl").symlink_to(folder / "target.jsonl")
    return folder / "out.jsonl"


def dangling_link(folder):
    (folder / "out.jsonl").symlink_to(folder / "nowhere")
    return folder / "out.jsonl"


def fifo(folder):
    os.mkfifo(folder / "out.jsonl")
    return folder / "out.jsonl"


def unix_socket(folder):
    socket.socket(socket.AF_UNIX).bind(str(folder / "out.jsonl"))
    return folder / "out.jsonl"


def directory(folder):
    (folder / "out.jsonl").mkdir()
    return folder / "out.jsonl"


def device(folder):
    return Path("/dev/null")


def missing_parent(folder):
    return folder / "none" / "out.jsonl"


def partial_is_the_prompts(folder):
    os.link(folder / "prompts.jsonl", folder / "out.jsonl.partial")
    return folder / "out.jsonl"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        (the_prompts, "is the file of prompts itself"),
        (other_spelling, "is the file of prompts itself"),
        (hard_link, "is the file of prompts itself"),
        (symbolic_link, "is a symbolic link"),
        (dangling_link, "is a symbolic link"),
        (fifo, "is no regular file"),
        (unix_socket, "is no regular file"),
        (directory, "is no regular file"),
        (device, "is no regular file"),
        (missing_parent, "cannot be written"),
        (partial_is_the_prompts, "is not layerbudget's"),
    ],
)
def test_what_must_not_be_replaced_is_refused_before_anything_is_loaded(prompts, place, message, overwrite) -> None:
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
    rows = [{"id": f"p{i}", "prompt": "abcdefgh"[: 1 + i % 8] * 20} for i in range(30)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, _ = load_backbone(str(model_folder), device="cpu")
    made = replace(make_allocator(model), decoding=Decoding(3), model_source=str(model_folder))
    made.save_pretrained(tmp_path / "allocator")
    command = ("generate", "--allocator", tmp_path / "allocator", "--prompts", prompts, "--batch-size", 2)
    assert layerbudget(*command, "--out", tmp_path / "whole.jsonl", "--device", "cpu").returncode == 0
    out = tmp_path / "out.jsonl"
    with files_up_to(4096):
        assert "file too large" in refused(*command, "--out", out, "--device", "cpu")
    assert not out.exists()
    begun = (tmp_path / "out.jsonl.partial").read_bytes()
    assert begun.count(b"\n") > 2
    assert layerbudget(*command, "--out", out, "--device", "cpu").returncode == 0
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


def test_a_retrained_controller_of_the_same_price_is_another_one(allocator, model, prompts) -> None:
    begun(allocator, model, prompts)
    retrained = make_allocator(model, controller=MLPController(epochs=2, hidden=16))
    retrained = replace(retrained, decoding=Decoding(3))
    assert retrained.certificate == allocator.certificate
    with pytest.raises(InputError, match="another allocator or other settings"):
        answer(retrained, model, prompts, prompts.with_name("out.jsonl"))
    answer(retrained, model, prompts, prompts.with_name("out.jsonl"), overwrite=True)
    assert len(prompts.with_name("out.jsonl").read_text().splitlines()) == len(ROWS)


def test_the_same_allocator_loaded_again_goes_on(allocator, model, prompts) -> None:
    begun(allocator, model, prompts)
    allocator.save_pretrained(prompts.parent / "saved")
    counts = []
    again = type(allocator).from_pretrained(prompts.parent / "saved")
    out = prompts.with_name("out.jsonl")
    answer(again, model, prompts, out, overwrite=True, begin=lambda *numbers: counts.append(numbers))
    assert counts == [(2, len(ROWS))]


def test_answers_in_another_dtype_are_not_mixed_in(allocator, model, prompts) -> None:
    begun(allocator, model, prompts)
    with pytest.raises(InputError, match="other settings"):
        answer(allocator, tiny_model("llama").to(torch.bfloat16), prompts, prompts.with_name("out.jsonl"))


def test_a_second_process_is_told_to_wait(allocator, model, prompts) -> None:
    out = prompts.with_name("out.jsonl")
    with lock_of(out), pytest.raises(InputError, match="another process is writing"):
        answer(allocator, model, prompts, out)


def test_prompts_too_long_for_the_model_are_named_first(allocator, model, prompts) -> None:
    rows = [*ROWS, {"id": "long", "prompt": "a" * 254}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = prompts.with_name("out.jsonl")
    with pytest.raises(PromptError, match=r"'long' has 254 tokens, which with 3 new ones is more than the 256"):
        answer(allocator, model, prompts, out)
    assert not list(prompts.parent.glob("out*"))
    with pytest.raises(PromptError, match="'p0' has 1 tokens, which with 1000 new ones"):
        answer(replace(allocator, decoding=Decoding(1000)), model, prompts, out)


def test_a_file_without_prompts_is_named(tmp_path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(PromptError, match="holds no prompts"):
        check_places(tmp_path / "none.jsonl", None, overwrite=False)
