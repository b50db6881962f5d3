"""The record of a share of the prompts: what `layerbudget certify` reads, whole lines, and failures of the disk."""

import errno
import json
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO

import pytest
from command import refused
from fake_engine import FakeEngine
from routed import PROMPTS, ask, routed

import serving.router.record
from backbone.errors import InputError
from oracle.prompts import load_prompts
from serving.router.record import LINE_START, PromptRecord

TURNS = [{"role": "system", "content": "be\nkind"}, {"role": "user", "content": "é \u2028", "name": None}]


@contextmanager
def recording(path, share=1.0):
    record = PromptRecord(path, share)
    try:
        yield record
    finally:
        record.close()


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERBUDGET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "later.jsonl"


def test_record_is_read_by_certify(path) -> None:
    with recording(path) as record, routed(FakeEngine(), record=record) as client:
        for prompt in ("the cat", ["sat\n", '"on"']):
            assert ask(client, prompt).status_code == 200
        for unrecorded in (PROMPTS[0], " ", "a" * 252, "a" * 9000, {}):
            assert ask(client, unrecorded).status_code == 200
        assert client.post("/v1/chat/completions", json={"messages": TURNS, "tools": [1]}).status_code == 200
        record.offer([TURNS])
    *texts, chat = load_prompts(str(path))
    assert [(one.prompt, one.raw, one.judge) for one in texts] == [
        (text, True, "agreement") for text in ("the cat", "sat\n", '"on"')
    ]
    assert [(turn.role, turn.content) for turn in chat.messages] == [("system", "be\nkind"), ("user", "é \u2028")]


def test_concurrent_requests_leave_whole_lines(path) -> None:
    prompts = [f"prompt {number}\n" + "a" * number for number in range(60)]
    with (
        recording(path) as record,
        routed(FakeEngine(), record=record) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        assert {answer.status_code for answer in threads.map(lambda one: ask(client, one), prompts)} == {200}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert Counter(row["prompt"] for row in rows) == Counter(prompts)


@pytest.mark.parametrize(("share", "low", "high"), [(0, 0, 0), (0.5, 120, 280), (1, 400, 400)])
def test_share_is_drawn_by_prompt(path, share, low, high) -> None:
    with recording(path, share) as record:
        record.offer(["a"] * 400)
    assert low <= path.read_bytes().count(b"\n") <= high


def test_record_is_the_users_own_and_is_continued(path) -> None:
    for prompt in ("a", "b"):
        with recording(path) as record:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert f"with probability 1 in {path} (mode 0600, at most 100 MiB)" in record.sentence
            record.offer([prompt])
    assert [one.prompt for one in load_prompts(str(path))] == ["a", "b"]


@pytest.mark.parametrize("half", [LINE_START[:5], LINE_START + b'"prompt":"c'])
def test_half_a_line_of_a_killed_process_is_removed(path, half) -> None:
    with recording(path) as record:
        record.offer(["a"])
    path.write_bytes(path.read_bytes() + half)
    with recording(path) as record:
        record.offer(["b"])
    assert [one.prompt for one in load_prompts(str(path))] == ["a", "b"]


class FullDisk(FileIO):
    def write(self, line):
        super().write(line[: len(line) // 2])
        if len(line) > 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(line) // 2


def test_full_disk_gives_one_logged_line_and_no_half_line(path, monkeypatch, caplog) -> None:
    with recording(path) as record:
        record.offer(["a"])
    with recording(path) as record, monkeypatch.context() as full:
        full.setattr(serving.router.record, "FileIO", FullDisk)
        record.offer(["b", "b" * 100, "b"])
        record.close()
    assert len(caplog.messages) == 1
    assert "No space left on device; requests go on" in caplog.messages[0]
    with recording(path) as record:
        record.offer(["c"])
    assert [one.prompt for one in load_prompts(str(path))] == ["a", "c"]


def test_removed_file_is_not_made_anew(path, caplog) -> None:
    with recording(path) as record, routed(FakeEngine(), record=record) as client:
        path.unlink()
        assert [ask(client, prompt).status_code for prompt in ("a", "b")] == [200, 200]
    assert [message.partition(": ")[2] for message in caplog.messages] == ["No such file or directory; requests go on"]
    assert not path.exists()


def test_record_ends_at_its_limit(path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(serving.router.record, "RECORD_BYTES", 200)
    with recording(path) as record:
        record.offer(["a"] * 20)
    assert 100 < path.stat().st_size <= 200
    assert len(load_prompts(str(path))) == path.read_bytes().count(b"\n")
    assert len(caplog.messages) == 1


def test_values_that_cannot_be_are_refused(path) -> None:
    def sentence(*words):
        return refused("serve", "--allocator", "none", *words)

    (path.parent / "folder.jsonl").mkdir()
    assert "--share should be a number from 0 to 1, got 2" in sentence("--record", path, "--share", 2)
    assert "--share should be a number from 0 to 1, got nan" in sentence("--record", path, "--share", "nan")
    assert "--share needs --record" in sentence("--share", 0.5)
    assert "is a folder; name a file" in sentence("--record", path.parent / "folder.jsonl")
    assert "should end in .jsonl" in sentence("--record", path.with_suffix(".txt"))
    assert "is missing; make it first" in sentence("--record", path.parent / "none" / "later.jsonl")
    assert not path.exists()
    path.write_text('{"prompt": "mine"}')
    assert "ends in half a line that is no recorded prompt" in sentence("--record", path)
    assert path.read_text() == '{"prompt": "mine"}'
    path.unlink()
    with recording(path), pytest.raises(InputError, match="another process records to"):
        PromptRecord(path, 1)
