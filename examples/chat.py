"""A chat that streams, each conversation under the plan that its first message was given.

python examples/chat.py runs/demo/allocator

One message a line; an empty line ends the chat. The cache is passed on from turn to turn, so that no message is
computed twice, and it keeps its plan.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TextStreamer

from layerbudget import Allocator, load_backbone


def main(folder: str, messages: Iterable[str], new_tokens: int = 32) -> None:
    allocator = Allocator.from_pretrained(folder)
    model, tokenizer = load_backbone(allocator.model_source)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids, cache = torch.zeros(1, 0, dtype=torch.long, device=model.device), None
    for message in messages:
        if not message.strip():
            break
        ids = torch.cat([ids, turn(tokenizer, message, first=cache is None).to(model.device)], dim=1)
        output = allocator.generate(
            model,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            streamer=streamer,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        ids, cache = output.sequences, output.cache
        print(f"[{output.layer_plans[0].layers:g} of {output.layer_plans[0].n_layers} layers]")


def turn(tokenizer: Any, message: str, first: bool) -> torch.Tensor:
    """The tokens [1, S] that a message adds to the conversation, by the model's chat template if it has one."""
    text = message.strip() + "\n"
    if templated := tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": message.strip()}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    special = first and not templated  # a template brings its own
    return tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin)
