"""A generation script with an allocator: the lines marked below are all that changes.

python examples/three_lines.py runs/demo/allocator "The capital of France is"
"""

from __future__ import annotations

import sys

from layerbudget import Allocator, load_backbone  # 1


def main(folder: str, prompt: str) -> None:
    allocator = Allocator.from_pretrained(folder)  # 2
    model, tokenizer = load_backbone(allocator.model_source)
    inputs = allocator.inputs(tokenizer, [prompt]).to(model.device)  # 3
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, custom_generate=allocator)  # 4
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:3])
