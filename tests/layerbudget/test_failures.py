import errno
import sqlite3

import pytest
from command import refused

from layerbudget.failures import sentence_of, visible
from pipelines.run import check

GOES_ON = "; once that is put right, the same command goes on from here"


def test_a_path_is_named_where_it_is_known() -> None:
    named = sentence_of(OSError(errno.ENOSPC, "No space left on device", "runs/x/menu.json"))
    assert named == f"cannot use runs/x/menu.json: no space left on device{GOES_ON}"
    unnamed = sentence_of(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert unnamed == f"cannot read or write a file: disk quota exceeded{GOES_ON}"


def test_the_target_of_a_move_is_the_path() -> None:
    error = IsADirectoryError(errno.EISDIR, "Is a directory", ".menu.json.new", None, "menu.json")
    assert str(sentence_of(error)).startswith("cannot use menu.json: is a directory")


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "[Errno 28] cannot write",
        "errno: 28",
    ],
)
def test_the_number_is_found_in_what_other_languages_say(text) -> None:
    assert "no space left on device" in str(sentence_of(RuntimeError(text)))


def test_a_read_only_database_is_named(tmp_path) -> None:
    path = tmp_path / "x.db"
    sqlite3.connect(path).execute("CREATE TABLE x (y)").connection.close()
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError) as caught:
        connection.execute("INSERT INTO x VALUES (1)")
    connection.close()
    assert str(sentence_of(caught.value)).startswith("cannot use a database of this run: attempt to write a readonly")


def test_what_lies_beneath_counts() -> None:
    error = RuntimeError("the storage failed")
    error.__cause__ = PermissionError(errno.EACCES, "Permission denied", "labels.db")
    assert str(sentence_of(error)).startswith("cannot use labels.db: permission denied")


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), FileNotFoundError(errno.ENOENT, "No such file", "x"), sqlite3.OperationalError("no such table: x")],
)
def test_faults_of_ours_stay_what_they_are(error) -> None:
    assert sentence_of(error) is None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("mlflow", "`pip install 'layerbudget[pipelines]'` brings it"),
        ("uvicorn", "`pip install 'layerbudget[serve]'` brings it"),
        ("psycopg2", "install the package that holds it"),
    ],
)
def test_a_missing_module_has_its_own_remedy(name, remedy, config_file, monkeypatch) -> None:
    def check_run(config) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(check, "check_run", check_run)
    assert refused("check", config_file()) == f"error: {name!r} is not installed; {remedy}"


def test_control_characters_become_visible() -> None:
    assert visible("Zürich \x1b[2J\r\n\u202e\x9b") == r"Zürich \x1b[2J\r\n\u202e\x9b"
