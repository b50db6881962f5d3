"""Work that is shared out gives what one process gives, whoever does it and in whatever order it comes back."""

import pickle
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from command import layerbudget, ran, refused

from backbone.healing.fit_bridges import bridges_of, fit_bridges
from layerbudget import cli
from layerbudget.options import LOCAL, with_ray_address
from oracle.batches import BATCHES, blocks
from oracle.decoding import Decoding
from oracle.prompts import Prompt
from pipelines.config import ConfigError, load_config
from pipelines.ray import distributed
from pipelines.ray.remote_work import remote_labeller
from pipelines.run import runner
from pipelines.run.prompts import IN_FULL
from pipelines.run.workspace import Workspace
from pipelines.stages import adapt, features, label
from pipelines.stages.features import FeatureParts

COLUMNS = "model, prompt, plan, decoding, judge, answer, answer_ids, score, prompt_tokens, forward_tokens"


class Scattered:
    """Does each piece with a task of its own, as many workers would, and gives the results in a drawn order."""

    def __init__(self, stop_after: int | None = None) -> None:
        self._stop_after = stop_after
        self.pieces = 0

    def map(self, task, pieces):
        order = random.Random(0).sample(range(len(pieces)), len(pieces))
        for number in order[: self._stop_after]:
            self.pieces += 1
            piece, own = pickle.loads(pickle.dumps((pieces[number], task)))
            yield number, pickle.loads(pickle.dumps(own(piece)))
        if self._stop_after is not None:
            raise KeyboardInterrupt


def content(store: Path) -> list[tuple]:
    with sqlite3.connect(store) as connection:
        return connection.execute(f"SELECT {COLUMNS} FROM labels ORDER BY {COLUMNS}").fetchall()


@pytest.fixture
def alone(config_file):
    """A run whose stages up to `features` one process did, in several blocks and batches."""
    config = load_config(config_file(label={"batch_size": 4}, features={"batch_size": 8}))
    for stage in ("menu", "adapt", "label", "features"):
        ran(stage, config.file)
    return config


@pytest.fixture
def other(alone, config_file):
    """The same run, of which only the menu is made."""
    path = config_file("other.yaml", name="other", label={"batch_size": 4}, features={"batch_size": 8})
    ran("menu", path)
    return load_config(path)


def test_stages_with_workers_give_what_one_process_gives(alone, other) -> None:
    workers = Scattered()
    for stage in (adapt, label, features):
        stage.run(Workspace(other), workers=workers)
    assert workers.pieces > 10
    assert content(other.folder / "labels.db") == content(alone.folder / "labels.db")
    for name in ("healing.safetensors", "menu.json"):
        assert (other.folder / name).read_bytes() == (alone.folder / name).read_bytes()
    tables = [parquet.read_table(config.folder / "features.parquet") for config in (other, alone)]
    assert tables[0].equals(tables[1])
    assert not (other.folder / "features").exists()


def test_what_came_back_before_a_stop_is_kept(alone, other) -> None:
    adapt.run(Workspace(other))
    for stage, name in ((label, "labels.db"), (features, "features")):
        with pytest.raises(KeyboardInterrupt):
            stage.run(Workspace(other), workers=Scattered(stop_after=2))
        assert (other.folder / name).exists()
        rest = Scattered()
        stage.run(Workspace(other), workers=rest)
        again = Scattered()
        stage.run(Workspace(other), workers=again)
        assert rest.pieces >= 1
        if stage is label:
            assert again.pieces == 0
        else:
            assert rest.pieces == again.pieces - 2
    assert content(other.folder / "labels.db") == content(alone.folder / "labels.db")


def test_an_added_plan_is_compared_with_the_answers_there(alone, tmp_path) -> None:
    workspace = Workspace(alone)
    before = content(alone.folder / "labels.db")
    with sqlite3.connect(alone.folder / "labels.db") as store:
        deleted = store.execute("DELETE FROM labels WHERE model LIKE '% with %' AND prompt < '8'").rowcount
    workers = Scattered()
    labeller = remote_labeller(workspace, workers, workspace.healing)
    steps: list[int] = []
    labeller.label(workspace.prompts.labelled(*IN_FULL), workspace.menu(), steps.append)
    assert sum(steps) == deleted > 0
    assert {row[:5] for row in content(alone.folder / "labels.db")} == {row[:5] for row in before}
    scores = [{(*row[:5], row[7]) for row in rows} for rows in (content(alone.folder / "labels.db"), before)]
    assert scores[0] == scores[1]


def test_a_worker_with_another_model_is_refused(alone, tmp_path) -> None:
    workspace = Workspace(alone)
    facts = workspace.model.facts
    workspace.model.__dict__["facts"] = facts.model_copy(update={"fingerprint": "llama-6x32-000000000000"})
    with pytest.raises(ConfigError, match="a worker finds another model"):
        remote_labeller(workspace, Scattered(), None).label(workspace.prompts.labelled(), workspace.menu())


@pytest.mark.parametrize("in_order", [False, True])
def test_sums_over_batches_make_the_bridges_of_one_process(model, in_order) -> None:
    from backbone.plan import LayerPlan

    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 97, (5 + i % 7,), generator=draw).tolist() for i in range(60)]
    plans = [LayerPlan.skipping(6, {2, 4}), LayerPlan.exiting(6, 3)]

    def over(summing, batches):
        for number in reversed(range(len(batches))):
            sums = summing.nothing(model)
            summing.add(model, batches[number], sums)
            yield number, pickle.loads(pickle.dumps(sums))

    options = {"in_order": in_order, "batch_tokens": 64, "rank": 4}
    made = [bridges_of(fit_bridges(model, sequences, plans, **options, over=how)) for how in (None, over)]
    for plan in plans:
        for first, bridge in made[0][plan].items():
            assert all(map(torch.equal, bridge.parameters, made[1][plan][first].parameters))


def some_prompts(n: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "t", "x" * (1 + i * 7 % 50), "", "exact") for i in range(n)]


def test_blocks_hold_each_prompt_once_and_equal_work() -> None:
    prompts = some_prompts(100)
    made = blocks(prompts, 2, Decoding(4))
    assert [len(blocks(some_prompts(n), 2, Decoding(4))) for n in (3, 16, 100, 400)] == [1, 4, 8, 400 // (2 * BATCHES)]
    flat = [prompt for block in made for prompt in block]
    assert sorted(prompt.id for prompt in flat) == sorted(prompt.id for prompt in prompts)
    assert [len(prompt.prompt) for prompt in flat] == sorted((len(p.prompt) for p in prompts), reverse=True)
    work = [sum(len(prompt.prompt) / 4 + 4 for prompt in block) for block in made]
    assert max(work) < 1.25 * min(work)
    assert blocks(prompts[::-1], 2, Decoding(4)) == made
    assert blocks([], 2, Decoding(4)) == []
    assert blocks(prompts[:3], 2, Decoding(4)) == [sorted(prompts[:3], key=lambda prompt: -len(prompt.prompt))]


def test_parts_of_features_are_there_as_a_whole(tmp_path) -> None:
    parts = FeatureParts(tmp_path / "parts")
    values = {"length": np.arange(3, dtype=np.float32)[:, None]}
    for number in (2, 3, 4, 10):
        parts.add(number, values)
    written = (tmp_path / "parts" / "2.npz").read_bytes()
    place = written.index(values["length"].tobytes())
    (tmp_path / "parts" / "2.npz").write_bytes(written[:-1])
    (tmp_path / "parts" / "3.npz").write_bytes(written[:place] + b"?" + written[place + 1 :])
    (tmp_path / "parts" / "4.npz").write_bytes(b"")
    assert parts.numbers() == {10}
    assert np.array_equal(parts.all()[0]["length"], values["length"])


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("label c.yaml --ray", f"label c.yaml --ray={LOCAL}"),
        ("label c.yaml --ray --set a=b", f"label c.yaml --ray={LOCAL} --set a=b"),
        ("label c.yaml --ray auto --set a=b", "label c.yaml --ray auto --set a=b"),
        ("label c.yaml --ray=h:1", "label c.yaml --ray=h:1"),
        ("generate --ray -- --ray", f"generate --ray={LOCAL} -- --ray"),
        ("", ""),
    ],
)
def test_the_address_may_be_left_out(given, read) -> None:
    assert with_ray_address(given.split()) == read.split()
    assert LOCAL == distributed.LOCAL


def test_what_cannot_be_shared_out_is_one_sentence(alone, tmp_path, monkeypatch) -> None:
    before = content(alone.folder / "labels.db")
    done = layerbudget("label", alone.file, "--ray", "auto", "--shard", "1/2")
    assert (done.returncode, "--shard and --ray were both given" in done.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'layerbudget[ray]'" in refused("label", alone.file, "--ray")
    assert "there is no label store" in refused("merge", alone.file, tmp_path / "nowhere.db")
    assert "cannot use the label store" in refused("merge", alone.file, alone.file)
    assert content(alone.folder / "labels.db") == before


def test_the_command_line_does_not_import_ray() -> None:
    code = f"import sys, {cli.__name__}, {runner.__name__}; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
