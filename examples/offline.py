"""Answer a file of prompts, one a line, as many as can be in batches of one plan.

python examples/offline.py runs/demo/allocator prompts.txt answers.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

from layerbudget import Allocator, load_backbone


def main(folder: str, prompts: str, answers: str) -> None:
    allocator = Allocator.from_pretrained(folder)
    model, tokenizer = load_backbone(allocator.model_source)
    texts = [line for line in Path(prompts).read_text().splitlines() if line.strip()]
    found = allocator.generate_many(model, tokenizer, texts, advance=lambda done: print(f"{done} more answered"))
    Path(answers).write_text("".join(f"{answer.plan.layers:g} layers: {answer.text!r}\n" for answer in found))


if __name__ == "__main__":
    main(*sys.argv[1:4])
