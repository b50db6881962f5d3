"""Token exits beside the allocator in a run on a tiny model: compared, reported, resumed, refused."""

import json
from pathlib import Path

import pytest
import yaml
from command import layerbudget

from pipelines.config import ConfigError, load_config
from pipelines.exit_comparison.answers import _read
from pipelines.exit_comparison.material import default_depths

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
