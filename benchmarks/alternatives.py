"""What else one would do with the prompts of a finished run: a probe for each task, a router by task, a LoRA.

    python benchmarks/alternatives.py --run runs/demo --name demo

All are scored on the run's test split, beside stock and the allocator:

- `probes`: a logistic regression for each task, from the state at the probe's depth to the reference. A task with more
  than 12 different references is open; the full model answers it.
- `task's name`: the run's own control, an allocator that sees the name of the task alone.
- `lora`: the full model with a LoRA (Hu et al. 2021, arXiv 2106.09685), trained on the references of the split `adapt`
  for the seconds that the run's stage `adapt` took.

Writes benchmarks/results/alternatives-NAME.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload
from peft import LoraConfig, get_peft_model
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from backbone.left_padding import padded_inputs
from backbone.plan import LayerPlan
from oracle.answered_prompts import reference_examples
from oracle.labels.generation import answer_batch
from oracle.prompts import Prompt
from pipelines.config import load_config
from pipelines.run.workspace import Workspace

RESULTS = Path(__file__).parent / "results"
CLOSED = 12
"""A task with more different references than these is open."""
RANK, LEARNING_RATE, BATCH = 16, 2e-4, 8
ALL_LINEAR = "all-linear"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of a finished run")
    options.add_argument("--name", default="demo", help="name in the result's file")
    arguments = options.parse_args()
    config = load_config(arguments.run / "config.yaml")
    workspace = Workspace(config.model_copy(update={"runs": arguments.run.parent, "name": arguments.run.name}))
    metrics = json.loads((arguments.run / "metrics.json").read_text())
    named = {"full": "stock", metrics["best"]: "allocator"}
    if "task" in metrics:
        named["task"] = "task's name"
    rows = {
        shown: {"score": metrics[name]["quality"], "budget": metrics[name]["budget"]} for name, shown in named.items()
    }
    rows["probes"] = probes(workspace)
    rows["lora"] = lora(workspace)
    model = {"model": config.model.source, "data": config.data.path, "run": arguments.run.name}
    path = RESULTS / f"alternatives-{arguments.name}.json"
    workload.write(path, argparse.Namespace(**vars(arguments) | model), {"contestants": rows})
    print(json.dumps(rows, indent=1))


def probes(workspace: Workspace) -> dict[str, Any]:
    """Score of probes on the test split; open tasks keep the full model's answers."""
    learned, test = workspace.table("train", "tune"), workspace.table("test")
    scores, tasks = test.full.copy(), {}
    for task in sorted(set(learned.tasks)):
        own, unseen = learned.tasks == task, test.tasks == task
        answers = np.array([prompt.reference for prompt in learned.prompts])[own]
        if len(set(answers)) > CLOSED or not unseen.any():
            continue
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        said = probe.fit(learned.features["states"][own], answers).predict(test.features["states"][unseen])
        asked = [prompt for prompt, is_own in zip(test.prompts, unseen, strict=True) if is_own]
        scores[unseen] = [prompt.score(answer, "") for prompt, answer in zip(asked, said, strict=True)]
        tasks[task] = {"score": float(scores[unseen].mean()), "stock": float(test.full[unseen].mean())}
    depth = workspace.menu().probe_depth / workspace.menu().n_layers
    closed = np.isin(test.tasks, list(tasks))
    return {"score": float(scores.mean()), "budget": float(np.where(closed, depth, 1.0).mean()), "tasks": tasks}


def lora(workspace: Workspace) -> dict[str, Any]:
    """Score of the full model with a LoRA trained for as long as the stage `adapt` took."""
    model, tokenizer = workspace.model.loaded
    examples = reference_examples(tokenizer, workspace.prompts.splits["adapt"], workspace.model.decoding)
    stages = json.loads(workspace.path("run.json").read_text())["stages"]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=ALL_LINEAR))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=LEARNING_RATE)
    generator, end, steps = np.random.default_rng(0), time.perf_counter() + stages["adapt"]["seconds"], 0
    while time.perf_counter() < end:
        picked = [examples[i] for i in generator.choice(len(examples), BATCH, replace=False)]
        inputs = padded_inputs(model, [one.tokens for one in picked])
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, one in enumerate(picked):
            labels[row, -one.answer :] = inputs["input_ids"][row, -one.answer :]
        optimizer.zero_grad()
        kept = 1 + max(one.answer for one in picked)
        tuned(**inputs, labels=labels[:, -kept:], logits_to_keep=kept).loss.backward()
        optimizer.step()
        steps += 1
    tuned.merge_and_unload()  # type: ignore[operator]  # one matrix product a layer again, for the answers
    return {"score": _score(workspace, workspace.table("test").prompts), "budget": 1.0, "steps": steps}


def _score(workspace: Workspace, prompts: Sequence[Prompt]) -> float:
    model, tokenizer = workspace.model.loaded
    plan, found = LayerPlan.full(workspace.menu().n_layers), []
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32]
        answers = answer_batch(model, tokenizer, [prompt.prompt for prompt in part], plan, workspace.model.decoding)
        found += [prompt.score(answer.text, "") for prompt, answer in zip(part, answers, strict=True)]
    return float(np.mean(found))


if __name__ == "__main__":
    main()
