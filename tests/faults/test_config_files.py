"""Damaged configurations, and values that no run can have."""

from __future__ import annotations

from itertools import pairwise

import pytest
import yaml
from damage import DEEP, damages_of
from outcome import must_be_refused
from project import QUICK_MENU, Project
from selection import selected

REPLACED: dict[str, str] = {
    "a key twice": "name: other\n{}",
    "a key twice further down": "{}extra: 1\nmore:\n  a: 1\n  a: 2\n",
    "an unknown key": "{}nmae: x\n",
    "a number as key": "{}1: x\n",
    "a list as key": "{}? [a, b]\n: x\n",
    "true as key": "{}on: x\n",
    "null as key": "{}~: x\n",
    "an alias": "{}try_prompts: &a [x]\nmore: *a\n",
    "an alias of itself": "{}more: &a [*a]\n",
    "a bomb of aliases": "{}a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise("abcdefghi")),
    "a Python object": "{}more: !!python/object/apply:os.system ['true']\n",
    "deep": "{}more: " + "[" * DEEP + "]" * DEEP + "\n",
    "a huge number": "{}more: " + "9" * 5000 + "\n",
    "no such date": "{}more: 2001-99-99\n",
    "half a character": '{}try_prompts: ["a\\ud800"]\n',
    "two documents": "{}---\nname: x\n",
    "tabs": "{}more:\n\t- x\n",
    "a NUL": "{}more: a\0b\n",
    "an endless text": '{}more: "abc\n',
}  # fmt: skip

SETTINGS = (
    f"name={'a' * 300}", "name=a.", "name=..", "name=", "name=a/b", "name=ä", "name=[]", "name={a: b}", "runs=7",
    "decoding.stop=['']", "decoding.stop=[1]", "decoding.stop=x", "decoding.max_new_tokens=0",
    "decoding.max_new_tokens=1e3", "decoding.max_new_tokens=1000000000", f"decoding.max_new_tokens={'9' * 400}",
    "decoding.max_new_tokens=.inf", "model.device=meta", "model.device=cuda:-1", "model.device=mps",
    "model.device=cpu:7", "model.device=cuda:999", "model.device=cuda:99999999999999", "model.device=''",
    "model.device=xpu", "model.device=CPU", "model.dtype=int8", "model.dtype=float64", "model.source=''",
    "model.source=none/of/this", "model.source=package:none", "model.source=package:json", "model.source=.",
    f"model.source={'a' * 300}", "model.source=~", "model.source=notes.txt", "model.source=none.gguf",
    "data.path=''", "data.path=.", f"data.path={'a' * 300}.jsonl", "data.path=no_such.jsonl", "data.path=runs",
    "data.columns={promt: x}",
    "data.chat_template=''", "data.chat_template=none.jinja", "data.chat_template=.", "data.chat_template=runs",
    "data.chat_template=prompts.jsonl", "data.chat_template=[never]", "data.chat_template=null",
    "data.limit=7", "data.limit=-1", "data.judge=''", "data.force_judge=taste",
    "data.shares={train: 2, tune: -1, calibrate: 0, test: 0}", "data.shares={train: .nan}",
    "menu.plans=1", "menu.probe_depth=0", "menu.probe_depth=99", "menu.cheapest_budget=0", "menu.cheapest_budget=.nan",
    "menu={method: given, given: ['']}", "menu={method: given, given: [0-]}", "menu={method: given, given: ['5-2']}",
    "menu={method: given, given: [0-99999999999], probe_depth: 2}", "menu={method: given}", "menu=null", "menu=[]",
    "adapt.epochs=.inf", "adapt.learning_rate=.nan", "adapt.learning_rate=0", "adapt.prompts=1", "adapt.rank=0",
    "label.batch_size=0", "label.tolerance=1", "label.limit=1", "features.sets=[]", "features.sets=[tase]",
    "features.sets=[length, length, embedding, states, path]", "features.batch_size=0", "tuning.trials=0",
    "tuning.components=[0]", "tuning.components=[]", "tuning.feature_sets=[[]]", "tuning.feature_sets=[[length], []]",
    "tuning.controllers=[]", "tuning.controllers=[forest]", "tuning.controllers=[lightgbm, lightgbm]",
    "tuning.folds=1", "tuning.folds=1000", "tuning.storage=nonsense", "tuning.storage=sqlite:////no/such/folder/x.db",
    "tuning.storage=''", "tuning.given={mlp: {}}", "tuning.given={mlp: {sets: [], components: 4}}",
    "tuning.given={mlp: {sets: [length], components: 4, parameters: {width: 2, colour: red}}}",
    "calibration.keep=0", "calibration.keep=.nan", "calibration.delta=1", "calibration.risk=low",
    "calibration.keep=[50]", "calibration.keep=[]", "evaluation.template='Q: {prompt}'", "evaluation.frozen=true",
    "evaluation.own_judges=4", "evaluation.speed_prompts=0", "tracking.uri=''", "tracking.uri=gopher://x",
    "tracking.uri=sqlite:////dev/null/x.db", "tracking.experiment=''", "try_prompts=['']",
    'try_prompts=["a\\ud800"]', "try_prompts=[3]",
    "unknown=1", "=1", "name", ".=1", "name.=1", "data..path=x",
)  # fmt: skip


@pytest.mark.parametrize("name", selected(list(damages_of("tiny.yaml")), every=9))
def test_a_damaged_configuration_is_refused(project, attempt, name) -> None:
    damages_of("tiny.yaml")[name](project.folder / "tiny.yaml")
    attempt(project, *QUICK_MENU, check=lambda ended: _still_says_what_the_file_says(project))


def _still_says_what_the_file_says(project: Project) -> str | None:
    """A flipped bit can leave another configuration that is one."""
    said = yaml.safe_load((project.folder / "tiny.yaml").read_text())
    resolved = yaml.safe_load((project.folder / said["runs"] / said["name"] / "config.yaml").read_text())
    different = [key for key, value in said.items() if not isinstance(value, dict) and resolved[key] != value]
    return f"{different} are not as the file says" if different else None


@pytest.mark.parametrize("name", selected(list(REPLACED), every=6))
def test_a_configuration_that_could_be_meant_otherwise_is_refused(project, attempt, name) -> None:
    path = project.folder / "tiny.yaml"
    path.write_text(REPLACED[name].replace("{}", path.read_text(), 1))
    attempt(project, *QUICK_MENU, check=must_be_refused)


@pytest.mark.parametrize("setting", selected(SETTINGS, every=24), ids=lambda setting: setting[:60])
def test_a_senseless_setting_is_refused(project, attempt, setting) -> None:
    attempt(project, "run", "tiny.yaml", "--set", setting, check=must_be_refused)
