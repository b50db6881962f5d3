"""A project folder with a tiny random model, any number of prompts and a configuration, for runs that last seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnop"


def make_project(folder: Path, prompts: int, batch_size: int, max_new_tokens: int, plans: int = 3) -> Path:
    """The configuration's path. Answers are judged by agreement with the full model; there are no healing parts."""
    folder.mkdir(parents=True, exist_ok=True)
    _save_model(folder / "model")
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(prompts):
            text = "".join(draw.choices(LETTERS, k=8 + number % 9))
            row = {"id": f"p{number}", "task": "t", "prompt": text, "reference": "", "judge": "agreement"}
            file.write(json.dumps(row) + "\n")
    config = {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "model": {"source": str(folder / "model"), "device": "cpu"},
        "data": {"path": str(folder / "prompts.jsonl")},
        "decoding": {"max_new_tokens": max_new_tokens},
        "menu": {"method": "exits", "probe_depth": 2, "plans": plans, "cheapest_budget": 0.4},
        "adapt": {"method": "none"},
        "label": {"batch_size": batch_size},
        "ray": {"max_workers": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # spread the logits, so that greedy tokens do not hang on rounding
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    ).save_pretrained(folder)
