"""The prompts of a run as they stand in their source, and their splits; loads no model, and not torch either."""

from __future__ import annotations

from collections.abc import Sequence

from oracle import splits
from oracle.prompts import Prompt, Split, load_prompts
from pipelines.config import Config, ConfigError

LEAST_OF_A_SPLIT = 2


def prompts_of(config: Config) -> list[Prompt]:
    """Raises PromptError, see `oracle.prompts.load_prompts`."""
    data = config.data
    return load_prompts(
        data.path,
        limit=data.limit,
        columns=data.columns,
        dataset_split=data.split,
        judge=data.judge,
        force_judge=data.force_judge,
    )


def splits_of(prompts: Sequence[Prompt], config: Config) -> dict[Split, list[Prompt]]:
    """The prompts of each split. Raises ConfigError where a split that is needed has too few."""
    parts = splits.splits_of(prompts, config.data.shares, config.data.seed)
    for split, own in parts.items():
        if len(own) < LEAST_OF_A_SPLIT and (split != "adapt" or config.makes_from_prompts):
            raise ConfigError(
                f"{len(prompts)} prompts leave {len(own)} for the split {split!r}, which needs {LEAST_OF_A_SPLIT} "
                "or more: use more prompts or other data.shares"
            )
    return parts
