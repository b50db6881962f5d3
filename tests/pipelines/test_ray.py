"""On a local cluster of two one-core workers. `make test-ray` installs Ray and runs all of it; see `selection.LONG`."""

import os
import random
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from command import ran, refused

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from ray_processes import content, finish, label_until_killed, label_while_killing
from tiny_project import make_project

from backbone.errors import InputError
from pipelines.config.sections import RaySection
from pipelines.ray.distributed import LOCAL, workers_at

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; `make test-ray` brings it")
LONG = os.environ.get("LAYERBUDGET_FAULTS") == "long"
TWO = RaySection(max_workers=2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[tuple]:
    """The labels that one process makes."""
    config = project(tmp_path_factory.mktemp("alone"))
    finish("label", str(config))
    return labels(config)


def project(folder: Path) -> Path:
    """A run that is about to be labelled."""
    config = make_project(folder, prompts=3000 if LONG else 600, batch_size=4, max_new_tokens=6)
    for stage in ("menu", "adapt"):
        finish(stage, str(config))
    return config


def labels(config: Path) -> list[tuple]:
    return content(config.parent / "runs" / "tiny" / "labels.db")


def test_killed_workers_lose_and_double_nothing(alone, tmp_path) -> None:
    config, kills = project(tmp_path), 20 if LONG else 2
    assert label_while_killing(config, kills, random.Random(0)) == kills
    assert labels(config) == alone


def test_killed_drivers_lose_and_double_nothing(alone, tmp_path) -> None:
    config, draw = project(tmp_path), random.Random(1)
    held = [label_until_killed(config, draw) for _ in range(5 if LONG else 1)]
    assert held == sorted(set(held)), "what was stored stays stored, and each begins where the last one stopped"
    finish("label", str(config), "--ray")
    assert labels(config) == alone


def test_stages_on_ray_end_as_in_one_process(config_file, tmp_path) -> None:
    paths = [config_file(f"{name}.yaml", name=name, label={"batch_size": 4}) for name in ("one", "two")]
    for path, words in zip(paths, ([], ["--ray"]), strict=True):
        ran("menu", path)
        for stage in ("adapt", "label", "features"):
            ran(stage, path, *words)
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    assert content(one / "labels.db") == content(two / "labels.db")
    assert (one / "healing.safetensors").read_bytes() == (two / "healing.safetensors").read_bytes()
    assert (one / "features.parquet").read_bytes() == (two / "features.parquet").read_bytes()


def refusing(piece: int) -> int:
    if piece == 3:
        raise InputError("three cannot be used; give another number")
    return piece * piece


def test_pieces_come_back_once_and_input_errors_as_they_are(monkeypatch) -> None:
    here = [str(Path(__file__).parent), *filter(None, sys.path)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(here))  # workers import this module for its functions
    with workers_at(LOCAL, TWO) as workers:
        assert workers is not None
        assert dict(workers.map(len, [])) == {}
        assert dict(workers.map(refusing, [0, 1, 2, 4])) == {0: 0, 1: 1, 2: 4, 3: 16}
        with pytest.raises(InputError, match=r"^three cannot be used; give another number$"):
            list(workers.map(refusing, [3]))
        with pytest.raises(Exception, match="division by zero"):
            list(workers.map(divided, [0]))


def divided(piece: int) -> float:
    return 1 / piece


def test_a_cluster_that_is_not_there_is_named(config_file) -> None:
    path = config_file()
    for stage in ("menu", "adapt"):
        ran(stage, path)
    assert "no Ray cluster can be used at 'auto'" in refused("label", path, "--ray", "auto")
