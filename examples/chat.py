"""A chat that streams, each conversation under the plan that its first message was given.

python examples/chat.py runs/demo/allocator

One message a line; an empty line ends the chat. In every turn the whole conversation is put into the chat template
that the allocator was made with. The cache goes on, with its plan, where the new text begins with the tokens that are
in it, so that no message is computed twice; where a template writes earlier turns otherwise than the model did, it
starts anew.
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
    turns: list[dict[str, str]] = []
    cached, cache = torch.zeros(1, 0, dtype=torch.long, device=model.device), None
    for message in messages:
        if not message.strip():
            break
        turns.append({"role": "user", "content": message.strip()})
        inputs = conversation(allocator, tokenizer, turns).to(model.device)
        if not begins_with(inputs["input_ids"], cached):
            cache = None
        output = allocator.generate(
            model,
            **inputs,
            cache=cache,
            streamer=streamer,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        turns.append({"role": "assistant", "content": answer})
        cache = output.cache
        cached = output.sequences[:, : cache.get_seq_length()]  # the last token of an answer was not computed with
        print(f"[{output.plans[0].layers:g} of {output.plans[0].n_layers} layers]")


def conversation(allocator: Allocator, tokenizer: Any, turns: list[dict[str, str]]) -> Any:
    """The tokens [1, S] of a conversation; its lines one after the other where the allocator has no chat template."""
    if allocator.chat is None:
        return allocator.inputs(tokenizer, ["".join(turn["content"] + "\n" for turn in turns)])
    return allocator.inputs(tokenizer, [turns])


def begins_with(tokens: torch.Tensor, cached: torch.Tensor) -> bool:
    """Whether tokens [1, S] go on from those in the cache [1, C], and further."""
    return tokens.shape[1] > cached.shape[1] and torch.equal(tokens[:, : cached.shape[1]], cached)


if __name__ == "__main__":
    main(sys.argv[1], sys.stdin)
