"""What a run will take: the figures, and the table on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from pipelines.progress import console, duration

_HOW_GOOD = (
    "A guide, from {measured:.0f} s of measurements on this machine, scaled by counts. Answers may be longer, plans "
    "may follow the full model less before they have stand-ins and more afterwards, trials may be given up early, and "
    "other work may slow the machine."
)


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage will take.

    Attributes:
        what: the work, in words; `done` where nothing is left of it.
        seconds: estimated.
    """

    name: str
    what: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SplitSize:
    """The prompts of a split, those of them that are labelled, and the tokens of all its prompts."""

    name: str
    prompts: int
    labelled: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run will take.

    Attributes:
        plans: K, the full plan included.
        answer_tokens: tokens that will be generated or followed, over all labels that are missing.
        disk_bytes: that the run folder will hold.
        measured_seconds: that the measurements took, the model's loading apart.
    """

    splits: list[SplitSize]
    plans: int
    answer_tokens: int
    disk_bytes: float
    stages: list[StageCost]
    measured_seconds: float

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def print_outlook(found: Outlook | None) -> None:
    """Prompts of each split, then the work and the time of each stage; None for a run that is finished."""
    if found is None:
        console.print("every stage is done; nothing is left to do")
        return
    splits = Table("split", "prompts", "labelled", "prompt tokens", box=None, pad_edge=False)
    for split in found.splits:
        splits.add_row(split.name, f"{split.prompts:,}", f"{split.labelled:,}", f"{split.tokens:,}")
    console.print(splits)
    console.print(
        f"\n{found.plans} plans; about {found.answer_tokens:,} answer tokens; {_size(found.disk_bytes)} of disk\n"
    )
    stages = Table("stage", "work", "time", box=None, pad_edge=False)
    for stage in found.stages:
        stages.add_row(stage.name, stage.what, "" if stage.what == "done" else duration(stage.seconds))
    stages.add_row("all", "", duration(found.seconds))
    console.print(stages)
    console.print("\n" + _HOW_GOOD.format(measured=found.measured_seconds))


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.1f} MB"
