"""The undamaged projects, made once, and the counts at the end of `make faults`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from child import Limits
from outcome import GOOD, RED, Check, Outcome, answer, judged, may_be_accepted
from project import GENERATE, Project, finished_project
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model; timings of it are kept there too."""
    folder = tmp_path_factory.mktemp("faults")
    os.environ["LAYERBUDGET_CACHE"] = str(folder / "cache")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    tiny_model("llama", layer_scale=0.5).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "mlruns").mkdir()
    return folder


@pytest.fixture(scope="session")
def finished(base: Path) -> Project:
    """A project whose run is finished; its allocator decides with an MLP."""
    return finished_project(base / "finished", base / "model", base / "mlruns", controllers=["mlp"])


@pytest.fixture(scope="session")
def trees(base: Path) -> Project:
    """The same, and its allocator decides with LightGBM."""
    return finished_project(base / "trees", base / "model", base / "mlruns", controllers=["lightgbm"])


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    """A copy to damage."""
    return finished.copy(tmp_path / "project")


@pytest.fixture
def expect_good(record_property: Callable[[str, Any], None]) -> Callable[[Outcome, str], None]:
    """Counts an outcome, and fails the test where it is a red one."""

    def expect(outcome: Outcome, seen: str) -> None:
        record_property("outcome", outcome)
        assert outcome in GOOD, f"{outcome}: {seen}"

    return expect


@pytest.fixture
def attempt(limits: Limits, expect_good: Callable[[Outcome, str], None]) -> Callable[..., None]:
    """A command in a project must have a good outcome; `check` looks at what it left behind where it was accepted."""
    usual = limits

    def attempt(project: Project, *words: object, check: Check = may_be_accepted, limits: Limits = usual) -> None:
        foreign = project.foreign
        ended = project.command(*words, limits=limits)
        expect_good(*judged(ended, project, foreign, check))

    return attempt


@pytest.fixture(scope="session")
def answers(request: pytest.FixtureRequest) -> dict[str, str]:
    """Name of an undamaged project -> what its allocator answers."""

    class Lazily(dict[str, str]):
        def __missing__(self, owner: str) -> str:
            ended = request.getfixturevalue(owner).command(*GENERATE, "abcabc")
            assert ended.status == 0, ended.err
            self[owner] = answer(ended.out)
            return self[owner]

    return Lazily()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    seen = [pair for report in reports for pair in report.user_properties]
    counts = Counter(value for name, value in seen if name == "outcome")
    if counts:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"{counts.total():5} cases")
        for outcome in (*GOOD, *RED):
            terminalreporter.write_line(f"{counts[outcome]:5} {outcome}")
    for what, count in Counter(value for name, value in seen if name == "counted").items():
        terminalreporter.write_line(f"{count:5} {what}")


@pytest.fixture
def limits() -> Limits:
    """The modes of files hold for root too, so that an unreadable file is one."""
    return Limits(obeys_modes=True)
