"""Chat templates in the manner of well-known ones, for the tiny tokenizer."""

from __future__ import annotations

from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

WITH_BEGIN = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '[' + turn['role'] + ']' + turn['content'] | trim + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
"""Writes the token that begins a sequence itself and takes no system turn."""

WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<system>be kind;' }}{% endif %}"
    "{% for turn in messages %}{{ '<' + turn['role'] + '>' + turn['content'] + ';' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""Has a system turn of its own where none is given, and no token that begins a sequence."""

DATED = "{{ '[' + strftime_now('%j %H:%M:%S %f') + ']' }}" + WITH_BEGIN


def chat_tokenizer(template: str | None = WITH_BEGIN) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a template; like many it begins every text with a token of its own."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = template
    return tokenizer
