"""The label store: every answer that was ever generated and judged, safe against kills at any moment.

One SQLite file in WAL mode with full synchronisation. A label's key is everything its score depends on, so labels of
other models, plans, decodings or judges can lie in one file and never mix.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from backbone.errors import InputError

FORMAT_VERSION = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (
    model TEXT NOT NULL, prompt TEXT NOT NULL, plan TEXT NOT NULL, decoding TEXT NOT NULL, judge TEXT NOT NULL,
    answer TEXT NOT NULL, score REAL NOT NULL, prompt_tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL,
    seconds REAL NOT NULL,
    PRIMARY KEY (model, prompt, plan, decoding, judge)
) WITHOUT ROWID
"""
_INSERT = "INSERT OR IGNORE INTO labels VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT * FROM labels WHERE model = ? AND plan = ? AND decoding = ?"


class StoreError(InputError):
    """A file that is not a label store, or one of another version."""


@dataclass(frozen=True, slots=True)
class Label:
    """One judged answer.

    Attributes:
        model: fingerprint of the model and the dtype it ran in.
        prompt: `Prompt.hash`.
        plan: text of the `LayerPlan`.
        decoding: text of the decoding settings.
        judge: name of the judge.
        answer: the answer, cut at the stop string.
        score: in [0, 1].
        prompt_tokens: tokens of the prompt, padding not counted.
        answer_tokens: tokens generated, the stopping one included.
        seconds: this label's share of its batch's time.
    """

    model: str
    prompt: str
    plan: str
    decoding: str
    judge: str
    answer: str
    score: float
    prompt_tokens: int
    answer_tokens: int
    seconds: float


class LabelStore:
    """Labels on disk. Each `add` is one transaction: after a kill it is there as a whole or not at all.

    Raises:
        StoreError: the file is not a label store, or one of a newer version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._connection() as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, FORMAT_VERSION):
                raise StoreError(f"{path} has label format {version}, this version reads {FORMAT_VERSION}")
            connection.execute(_SCHEMA)
            connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=60)
        try:
            connection.execute("PRAGMA synchronous=FULL")
            with connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise StoreError(f"cannot use the label store {self.path}: {error}") from error
        finally:
            connection.close()

    def add(self, labels: Iterable[Label]) -> None:
        """Keep these labels; one that is there already stays as it is."""
        with self._connection() as connection:
            connection.executemany(_INSERT, [astuple(label) for label in labels])

    def read(self, model: str, plan: str, decoding: str) -> dict[tuple[str, str], Label]:
        """(prompt hash, judge) -> label, for one model, plan and decoding."""
        with self._connection() as connection:
            found = [Label(*row) for row in connection.execute(_SELECT, (model, plan, decoding))]
        return {(label.prompt, label.judge): label for label in found}

    def __len__(self) -> int:
        with self._connection() as connection:
            (count,) = connection.execute("SELECT COUNT(*) FROM labels").fetchone()
        return int(count)
