"""The label store: every answer that was ever generated and judged, safe against kills at any moment.

One SQLite file in WAL mode with full synchronisation. A label's key is everything its score depends on, so labels of
other models, plans, decodings or judges can lie in one file and never mix.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from backbone.errors import InputError

FORMAT_VERSION = 2

_SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (
    model TEXT NOT NULL, prompt TEXT NOT NULL, plan TEXT NOT NULL, decoding TEXT NOT NULL, judge TEXT NOT NULL,
    answer TEXT NOT NULL, answer_ids TEXT NOT NULL, score REAL, prompt_tokens INTEGER NOT NULL,
    forward_tokens REAL NOT NULL, seconds REAL NOT NULL,
    PRIMARY KEY (model, decoding, plan, prompt, judge)
) WITHOUT ROWID
"""
_INSERT = "INSERT OR IGNORE INTO labels VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT {what} FROM labels WHERE model = ? AND plan = ? AND decoding = ?"
_AMONG = " AND prompt IN (SELECT value FROM json_each(?))"


class StoreError(InputError):
    """A file that is not a label store, or one of another version."""


CUT = " …"


@dataclass(frozen=True, slots=True)
class Label:
    """One judged answer.

    Attributes:
        model: fingerprint of the model and the dtype it ran in.
        prompt: `Prompt.hash`.
        plan: text of the `LayerPlan`.
        decoding: text of the decoding settings.
        judge: `oracle.judges.judge_key` of the judge.
        answer: the answer, cut at the stop string; ends with CUT where its score was certain before its end. The judge
            `kl` needs none under a shortened plan: CUT alone.
        answer_ids: tokens of the answer, the stopping one included; of one that was cut short at least up to the first
            that is not the full model's.
        score: in [0, 1]; NaN where the judge failed.
        prompt_tokens: tokens of the prompt, padding not counted.
        forward_tokens: tokens that were passed through the network for this label, each weighted by the share of the
            layers that it passed.
        seconds: this label's share of its batch's time.
    """

    model: str
    prompt: str
    plan: str
    decoding: str
    judge: str
    answer: str
    answer_ids: tuple[int, ...]
    score: float
    prompt_tokens: int
    forward_tokens: float
    seconds: float


class LabelStore:
    """Labels on disk. Each `add` is one transaction: after a kill it is there as a whole or not at all.

    Args:
        path: the file; made where it is missing.
        read_only: leave the file as it is; a read-only folder will do.

    Raises:
        StoreError: the file is not a label store, a damaged one, or one of a newer version; with `read_only`, there is
            none.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path, self._read_only = path, read_only
        with self._connection() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in ((FORMAT_VERSION,) if read_only else (0, FORMAT_VERSION)):
                raise StoreError(f"{path} has label format {version}, this version reads {FORMAT_VERSION}")
            (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
            if state != "ok":  # whoever misses a label makes it again, beside one whose page or key is torn
                first = state.splitlines()[-1]
                raise StoreError(f"the label store {path} is damaged ({first}); put a copy in its place, or remove it")
            if not read_only:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute(_SCHEMA)
                connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            connection = sqlite3.connect(self._address(), timeout=60, uri=True)
        except sqlite3.Error as error:
            raise StoreError(f"cannot open the label store {self.path}: {error}") from error
        try:
            connection.execute("PRAGMA synchronous=FULL")
            with connection:
                yield connection
        except (sqlite3.Error, OverflowError, UnicodeError) as error:
            raise StoreError(f"cannot use the label store {self.path}: {error}") from error
        finally:
            connection.close()

    def _address(self) -> str:
        """What SQLite opens. A store in WAL mode is read by way of files beside it, which the last reader removes;
        where they cannot be made, nobody can be writing either."""
        mode = "mode=rw" if os.access(self.path.parent, os.W_OK) else "immutable=1"
        return f"{self.path.resolve().as_uri()}?{mode if self._read_only else 'mode=rwc'}"

    def add(self, labels: Iterable[Label]) -> None:
        """Keep these labels; one that is there already stays as it is."""
        with self._connection() as connection:
            connection.executemany(_INSERT, [_to_row(label) for label in labels])

    def read(
        self, model: str, plan: str, decoding: str, prompts: Iterable[str] | None = None
    ) -> dict[tuple[str, str], Label]:
        """(prompt hash, judge) -> label, for one model, plan and decoding; of these prompts (hashes), or of all."""
        found = [_from_row(row) for row in self._select("*", (model, plan, decoding), prompts)]
        return {(label.prompt, label.judge): label for label in found}

    def keys(self, model: str, plan: str, decoding: str, prompts: Iterable[str] | None = None) -> set[tuple[str, str]]:
        """(prompt hash, judge) of the labels that `read` gives."""
        return {(prompt, judge) for prompt, judge in self._select("prompt, judge", (model, plan, decoding), prompts)}

    def _select(self, what: str, key: tuple[str, str, str], prompts: Iterable[str] | None) -> list[tuple[Any, ...]]:
        query, among = (_SELECT, ()) if prompts is None else (_SELECT + _AMONG, (json.dumps(list(prompts)),))
        with self._connection() as connection:
            return list(connection.execute(query.format(what=what), (*key, *among)))

    def merge(self, other: Path) -> int:
        """Take over what another store holds and this one does not; the number of labels taken.

        Raises:
            StoreError: the other file is not a label store of this version.
        """
        if not other.is_file():
            raise StoreError(f"there is no label store {other}")
        LabelStore(other)
        before = len(self)
        with self._connection() as connection:
            connection.execute("ATTACH DATABASE ? AS other", (str(other),))
            connection.execute("INSERT OR IGNORE INTO main.labels SELECT * FROM other.labels")
        return len(self) - before

    def to_parquet(self, path: Path) -> None:
        """Write all labels to a Parquet file, which `datasets` and pandas read too (needs `layerbudget[pipelines]`)."""
        import pyarrow
        from pyarrow import parquet

        with self._connection() as connection:
            rows = [_from_row(row) for row in connection.execute("SELECT * FROM labels")]
        columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(Label)}
        parquet.write_table(pyarrow.table(columns), path)

    def add_parquet(self, path: Path) -> None:
        """Add the labels of a file that `to_parquet` wrote; one that is there already stays as it is."""
        from pyarrow import parquet

        self.add(
            Label(**{**row, "answer_ids": tuple(row["answer_ids"])}) for row in parquet.read_table(path).to_pylist()
        )

    def __len__(self) -> int:
        with self._connection() as connection:
            (count,) = connection.execute("SELECT COUNT(*) FROM labels").fetchone()
        return int(count)


def _to_row(label: Label) -> tuple[Any, ...]:
    return astuple(replace(label, answer_ids=" ".join(map(str, label.answer_ids))))  # type: ignore[arg-type]


def _from_row(row: tuple[Any, ...]) -> Label:
    label = Label(*row)
    score = float("nan") if label.score is None else label.score  # SQLite keeps NaN as NULL
    try:
        return replace(label, answer_ids=tuple(map(int, str(label.answer_ids).split())), score=float(score))
    except ValueError as error:
        raise StoreError(f"the label of prompt {label.prompt} under {label.plan} is damaged: {error}") from None
