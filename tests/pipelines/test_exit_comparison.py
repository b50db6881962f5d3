"""Token exits beside the allocator in a run on a tiny model: compared, reported, resumed, refused."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from command import layerbudget
from tiny import tiny_model, tiny_tokenizer

from backbone.fingerprint import model_fingerprint
from backbone.plan import LayerPlan
from backbone.stand_ins.attaching import StandIns, attach
from backbone.stand_ins.fit_bridges import bridges_of, fit_bridges
from oracle.decoding import Decoding
from oracle.prompts import Prompt
from pipelines.config import ConfigError, load_config
from pipelines.exit_comparison.answers import ExitAnswers, _read
from pipelines.exit_comparison.comparison import Comparison
from pipelines.exit_comparison.material import default_depths
from pipelines.workspace import Workspace
from runtime.allocator import Allocator
from runtime.token_exits.gates.of_the_head import TopProbability
from runtime.token_exits.heads import ExitHeads
from runtime.token_exits.settings import ExitSettings
from runtime.token_exits.token_exits import TokenExits

EXITS = {
    "enabled": True,
    "gates": ["entropy", "saturation", "classifier"],
    "agreements": [0.9, 0.5],
    "tokens": 64,
    "prompts": 12,
    "batches": [1, 4],
    "training_steps": 20,
}


def test_a_run_compares_token_exits(config_file) -> None:
    path = config_file(
        token_exits=EXITS,
        decoding={"max_new_tokens": 5},
        tuning={"trials": 1, "components": [6], "folds": 2, "controllers": ["mlp"]},
        calibration={"keep": 0.7, "delta": 0.2, "outliers": 0.5},
    )
    done = layerbudget("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(yaml.safe_load(path.read_text())["runs"]) / "tiny"
    found = json.loads((folder / "metrics.json").read_text())["token_exits"]
    names = [each["name"] for each in found["contestants"]]
    assert names[:3] == ["full", "best static plan", "allocator"]
    assert names[3:6] == ["entropy, bridged", "saturation, bridged", "classifier, bridged"]
    assert names[6].endswith("frozen")
    assert names[7].startswith("allocator and")
    full = found["contestants"][0]
    assert full["quality_ratio"] == 1
    assert full["layers_a_token"] == 6
    for each in found["contestants"]:
        assert 0 < each["layers_a_token"] <= 6
        assert set(each["speed"]) == {"1", "4"}
        assert each["quality_interval"][0] <= each["quality_ratio"] <= each["quality_interval"][1]
    for each in found["contestants"][3:]:
        certificate = each["certificate"]
        assert len(certificate["thresholds"]) == len(certificate["losses"]) == 2
        assert each["step"] is not None or each["layers_a_token"] == 6
    assert all(after <= before for before, after in found["training"].values())
    assert set(found["gates"]) == {*EXITS["gates"], "entropy of the whole head"}
    assert "Token exits beside plans" in (folder / "report.html").read_text()
    _check_resumes(path, folder)
    _check_contestants(path, folder)


def _check_contestants(path: Path, folder: Path) -> None:
    """Outliers run the full plan, as the certificate assumes, and the gate is picked without the test prompts."""
    Workspace.forget()
    comparison = Comparison(Workspace.of(load_config(path)))
    allocator = Allocator.from_pretrained(folder / "allocator")
    bold = replace(allocator, certificate=replace(allocator.certificate, price=1e-3))
    sent = allocator.outliers.are_outliers(comparison.test.features)
    with patch.object(Allocator, "from_pretrained", lambda place: bold):
        plans = comparison._allocator().plans
    assert 0 < sum(sent) < len(sent)
    assert [plan.is_full for plan in plans] == sent.tolist()
    best = comparison.best_gate()
    cheap = {gate: 1.0 if gate != best else 6.0 for gate in EXITS["gates"]}
    exits = comparison._exits

    def other_layers(gate: str, heads: str):
        made = exits(gate, heads)
        return replace(made, layers=0 * made.layers + cheap[gate])

    with patch.object(comparison, "_exits", other_layers):
        assert comparison.contestants()[-1].name == f"allocator and {best}, bridged"


def _bridged(model):
    plan = LayerPlan.exiting(6, 4)
    bridges = bridges_of(fit_bridges(model, [[1, *range(5 + i, 25 + i)] for i in range(8)], [plan]))
    attach(model, StandIns(model_fingerprint(model), bridges))
    return model


PROMPT = Prompt("one", "task", "abc", "def", "rouge_l")
ANSWERED = {
    "the same": {},
    "token exits": {"key": "top: 0.6"},
    "plan": {"plan": LayerPlan.exiting(6, 4)},
    "decoding": {"decoding": Decoding(4)},
    "model": {"model": tiny_model("llama", seed=1)},
    "stand-ins": {"plan": LayerPlan.exiting(6, 4), "model": _bridged(tiny_model("llama"))},
    "prompt": {"prompt": replace(PROMPT, prompt="abd")},
    "reference": {"prompt": replace(PROMPT, reference="deg")},
    "judge": {"prompt": replace(PROMPT, judge="contains")},
}


def test_answers_are_kept_for_what_made_them(tmp_path) -> None:
    same, made = tiny_model("llama"), []
    for what, change in ANSWERED.items():
        asked = {"key": "top: 0.5", "model": same, "decoding": Decoding(3), "plan": None, "prompt": PROMPT, **change}

        def make(model=asked["model"], what=what) -> TokenExits:
            made.append(what)
            return TokenExits(ExitSettings(TopProbability(), ExitHeads(model), (2, 4), 0.5))

        for _ in range(2):
            answers = ExitAnswers(
                tmp_path / "answers.jsonl", asked["model"], tiny_tokenizer(), asked["decoding"], 4, {"one": ""}
            )
            answers.of(asked["key"], make, [asked["prompt"]], asked["plan"] and [asked["plan"]])
    assert made == list(ANSWERED)


def _check_resumes(path: Path, folder: Path) -> None:
    """After a kill in the middle of a line everything that was whole is used again."""
    file = folder / "exit_answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-3]) + lines[-3][:20])
    assert layerbudget("evaluate", path).returncode == 0
    again = file.read_text().splitlines(keepends=True)
    assert again[: len(lines) - 3] == lines[:-3]
    assert len(_read(file)) == len(lines)


def test_judges_that_read_no_answer_are_refused(config_file) -> None:
    path = config_file(token_exits=EXITS, data={"path": "embedded", "force_judge": "kl"})
    with pytest.raises(ConfigError, match=r"token_exits\.enabled compares answers"):
        load_config(path)


@pytest.mark.parametrize("wrong", [{"agreements": [0.5, 0.9]}, {"depths": [4, 2]}, {"gates": ["guess"]}])
def test_settings_that_cannot_be(config_file, wrong) -> None:
    with pytest.raises(ConfigError, match="token_exits"):
        load_config(config_file(token_exits={**EXITS, **wrong}))


@pytest.mark.parametrize(("n_layers", "depths"), [(18, [6, 8, 10, 12, 14, 16]), (6, [2, 3, 4, 5]), (2, [1])])
def test_default_candidate_layers(n_layers: int, depths: list[int]) -> None:
    assert default_depths(n_layers) == depths
