"""Token exits beside the allocator of a finished tiny run: compared and certified."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import exit_contestants
import exit_findings
import exit_material
import exits
import pytest
import torch

from pipelines.config import load_config
from pipelines.run.runner import run_one
from pipelines.run.state import STAGES
from pipelines.run.workspace import Workspace

GATES = ["entropy", "saturation", "classifier"]


@pytest.fixture
def run(config_file, monkeypatch, tmp_path) -> Path:
    """The folder of a run up to its certificate."""
    monkeypatch.setattr(exit_material, "AGREEMENTS", (0.9, 0.5))
    monkeypatch.setattr(exit_contestants, "AGREEMENTS", (0.9, 0.5))
    monkeypatch.setattr(exit_material, "TOKENS", 64)
    monkeypatch.setattr(exits, "RESULTS", tmp_path)
    path = config_file(
        decoding={"max_new_tokens": 5},
        tuning={"trials": 1, "components": [6], "folds": 2, "controllers": ["mlp"]},
        calibration={"keep": 0.7, "delta": 0.2, "outliers": 0.5},
    )
    names = [stage.name for stage in STAGES]
    for name in names[: names.index("evaluate")]:
        run_one(load_config(path), name)
    return tmp_path / "runs" / "tiny"


def test_token_exits_are_compared_on_a_finished_run(run, monkeypatch, tmp_path) -> None:
    options = f"--run {run} --name tiny --gates {' '.join(GATES)} --batches 1 4 --prompts 12 --training-steps 20"
    for part in ("comparison", "findings"):
        monkeypatch.setattr(sys, "argv", ["exits.py", part, *options.split()])
        exits.main()
    kept = json.loads((tmp_path / "token-exits-tiny.json").read_text())
    found = kept["comparison"]
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
        assert len(each["certificate"]["thresholds"]) == 2
        assert set(each["certificate"]["bounds"]) == {str(alpha) for alpha in exit_contestants.ALPHAS}
        assert each["step"] is not None or each["layers_a_token"] == 6
    assert all(after <= before for before, after in found["training"].values())
    assert set(found["gates"]) == {*GATES, "entropy of the whole head"}
    assert set(kept["findings"]["heads"]) == {"frozen", "bridged", "trained"}


def test_outliers_run_the_full_plan(run) -> None:
    """As the certificate assumes."""
    material = exit_material.Material(Workspace(load_config(run / "config.yaml")), GATES)
    comparison = exit_contestants.Comparison(material, 12)
    allocator = comparison.allocator
    comparison.allocator = replace(allocator, certificate=replace(allocator.certificate, price=1e-3))
    sent = allocator.outliers.are_outliers(comparison.test.features)
    assert 0 < sum(sent) < len(sent)
    assert [plan.is_full for plan in comparison.allocated().plans] == sent.tolist()


@pytest.mark.parametrize(("n_layers", "depths"), [(18, [6, 8, 10, 12, 14, 16]), (6, [2, 3, 4, 5]), (2, [1])])
def test_default_candidate_layers(n_layers: int, depths: list[int]) -> None:
    assert exit_material.default_depths(n_layers) == depths


def test_area_of_a_perfect_and_of_a_useless_gate() -> None:
    agrees = torch.tensor([True] * 6 + [False] * 4)
    perfect = exit_findings.risk_coverage_area(agrees.float(), agrees)
    assert perfect == pytest.approx(sum(max(k - 6, 0) / k for k in range(1, 11)) / 10)
    assert exit_findings.risk_coverage_area(torch.zeros(10), agrees) == pytest.approx(0.4)
    both = torch.stack([agrees.float(), torch.zeros(10)])
    assert exit_findings.mean_area(both, agrees.expand(2, -1)) == pytest.approx((perfect + 0.4) / 2)
