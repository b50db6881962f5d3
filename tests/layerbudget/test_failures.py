import errno
import sqlite3

import pytest
from command import refused

from layerbudget.failures import sentence_of, visible
from pipelines.run import check

GOES_ON = "; once that is put right, the same command goes on from here"


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def missing(name: str | None) -> ModuleNotFoundError:
    return ModuleNotFoundError("it is not there", name=name)


FULL_DISK = "cannot read or write a file: no space left on device"
DENIED = PermissionError(errno.EACCES, "Permission denied", "labels.db")
SENTENCES = [
    (
        OSError(errno.ENOSPC, "No space left", "runs/x/menu.json"),
        "cannot use runs/x/menu.json: no space left on device",
    ),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "cannot read or write a file: disk quota exceeded"),
    (IsADirectoryError(errno.EISDIR, "", ".menu.json.new", None, "menu.json"), "cannot use menu.json: is a directory"),
    (caused(RuntimeError("the storage failed"), DENIED), "cannot use labels.db: permission denied"),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), FULL_DISK),
    (RuntimeError("[Errno 28] cannot write"), FULL_DISK),
    (RuntimeError("errno: 28"), FULL_DISK),
]
HIDDEN = KeyError("x")
HIDDEN.__context__, HIDDEN.__suppress_context__ = DENIED, True  # as `raise ... from None` leaves them
IN_A_CIRCLE = ValueError("y")
OURS = [
    caused(KeyError("x"), caused(IN_A_CIRCLE, IN_A_CIRCLE)),
    KeyError("x"),
    HIDDEN,
    FileNotFoundError(errno.ENOENT, "No such file", "x"),
    sqlite3.OperationalError("no such table: x"),
]


@pytest.mark.parametrize(("error", "sentence"), SENTENCES)
def test_what_the_machine_refuses_is_one_sentence(error, sentence) -> None:
    assert sentence_of(error) == sentence + GOES_ON


@pytest.mark.parametrize("error", OURS)
def test_faults_of_ours_stay_what_they_are(error) -> None:
    assert sentence_of(error) is None


def test_a_read_only_database_is_named(tmp_path) -> None:
    path = tmp_path / "x.db"
    sqlite3.connect(path).execute("CREATE TABLE x (y)").connection.close()
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    with pytest.raises(sqlite3.OperationalError) as caught:
        connection.execute("INSERT INTO x VALUES (1)")
    connection.close()
    assert str(sentence_of(caught.value)).startswith("cannot use a database of this run: attempt to write a readonly")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (missing("mlflow"), "'mlflow' is not installed; `pip install 'layerbudget[pipelines]'` brings it"),
        (missing("uvicorn"), "'uvicorn' is not installed; `pip install 'layerbudget[serve]'` brings it"),
        (missing("psycopg2"), "'psycopg2' is not installed; install the package that holds it"),
        (missing(None), "a package is not installed: it is not there"),
        (
            BrokenPipeError(errno.EPIPE, "Broken pipe"),
            "another process that works for this command has ended; start the command again",
        ),
    ],
)
def test_an_error_of_a_command_has_its_own_remedy(error, sentence, config_file, monkeypatch) -> None:
    def check_run(config) -> None:
        raise error

    monkeypatch.setattr(check, "check_run", check_run)
    assert refused("check", config_file()) == f"error: {sentence}"


def test_control_characters_become_visible() -> None:
    assert visible("Zürich \x1b[2J\r\n\u202e\x9b") == r"Zürich \x1b[2J\r\n\u202e\x9b"
