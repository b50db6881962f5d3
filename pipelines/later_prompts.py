"""Prompts that a saved allocator is to be certified on: enough of them, and none that was used for it before."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from backbone.errors import InputError
from backbone.files import write_atomically
from controller.certificate.certificate import Certificate, alpha_of
from controller.certificate.p_values import fewest_prompts
from oracle.prompts import Prompt, PromptError
from pipelines.config import load_config
from pipelines.run.progress import say
from pipelines.run.prompts import prompts_of

OTHERS = "a certificate needs prompts that nothing was chosen by"


def levels_of(certificate: Certificate) -> tuple[float, ...]:
    """The values of `keep` that share its confidence."""
    return certificate.levels or (certificate.keep,)


def check_enough(old: Certificate, prompts: Sequence[Prompt]) -> None:
    """Raises PromptError where the loosest bound cannot be shown with so many prompts, whatever they lose."""
    levels = levels_of(old)
    if (keep := min(levels)) >= 1:
        return
    sizes = Counter(prompt.task for prompt in prompts) if old.per_task else {"": len(prompts)}
    task, size = min(sizes.items(), key=lambda item: item[1])
    if size < (least := fewest_prompts(alpha_of(keep), old.delta / len(levels), old.risk)):
        of_task = f" of the task {task!r}" if task else ""
        raise PromptError(
            f"there are {size} prompts{of_task}; keep={keep:g} at delta {old.delta / len(levels):g} takes {least}, "
            "whatever they lose: give more prompts"
        )


def check_unused(prompts: Sequence[Prompt], used: Path, run: Path) -> None:
    """Raises PromptError for prompts of an earlier certification, or with texts of the run the allocator is from."""
    known = _used(used)
    if run.is_file():
        try:
            known |= _texts(prompts_of(load_config(run)))
        except InputError as error:
            say(f"  cannot tell which prompts the run in {run.parent} has seen: {error}", style="yellow")
    if seen := [prompt.id for prompt in prompts if _text(prompt) in known]:
        raise PromptError(
            f"{len(seen)} of {len(prompts)} prompts were used for this allocator before, the first is {seen[0]!r}; "
            f"{OTHERS}: leave these out"
        )


def note_used(path: Path, prompts: Sequence[Prompt]) -> None:
    """These prompts have been looked at, whether or not they certify anything."""
    write_atomically(path, json.dumps({"texts": sorted(_used(path) | _texts(prompts))}, indent=1) + "\n")


def _used(path: Path) -> set[str]:
    try:
        return set(json.loads(path.read_text(encoding="utf-8"))["texts"]) if path.exists() else set()
    except (ValueError, KeyError, TypeError):
        raise PromptError(f"{path}, which names the prompts that were used before, is damaged; remove it") from None


def _texts(prompts: Iterable[Prompt]) -> set[str]:
    return {_text(prompt) for prompt in prompts}


def _text(prompt: Prompt) -> str:
    return hashlib.sha256(prompt.text_key.encode()).hexdigest()[:24]
