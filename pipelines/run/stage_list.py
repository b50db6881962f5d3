"""The stages of a run: what each reads, which stages it follows, which files it leaves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage.

    Attributes:
        reads: the configuration keys that its result depends on.
        follows: the stages whose results it uses.
        files: what it leaves in the run folder.
        notes: of these files those that only tell how it went (times, dates): no later stage depends on them.
    """

    name: str
    title: str
    reads: tuple[str, ...]
    follows: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()


STAGES: tuple[Stage, ...] = (
    Stage("menu", "find the plans to choose from", ("menu", "decoding"), (), ("menu.json",)),
    Stage(
        "adapt",
        "make the shortened plans better",
        ("adapt", "label.batch_size"),
        ("menu",),
        ("healing.safetensors", "adapt.json"),
        notes=("adapt.json",),
    ),
    Stage(
        "label",
        "answer and judge the prompts under every plan",
        ("label.batch_size", "label.limit"),
        ("adapt",),
        ("labels.db",),
    ),
    Stage(
        "features",
        "read the first layers' states of every prompt",
        ("features", "label.limit"),
        ("menu",),
        ("features.parquet",),
    ),
    Stage(
        "tune",
        "search each controller's settings",
        ("tuning", "label.tolerance", "calibration.keep", "calibration.risk"),
        ("label", "features"),
        ("tuning.json", "winner.yaml"),
    ),
    Stage("train", "train the controllers", (), ("tune",), ("controllers",)),
    Stage(
        "calibrate",
        "certify a price, labelling what it chooses",
        ("calibration",),
        ("train",),
        ("calibration.json", "allocator"),
    ),
    Stage(
        "evaluate",
        "measure all policies on unseen prompts",
        ("evaluation",),
        ("calibrate",),
        ("metrics.json", "choices.json"),
    ),
    Stage(
        "report",
        "write the report, log the run",
        ("tracking", "name"),
        ("evaluate",),
        ("report.html", "logged.json"),
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}


def all_before(stage: Stage) -> list[Stage]:
    """The stages that a stage follows, and those that they follow, in order."""
    names = set(stage.follows)
    for name in stage.follows:
        names |= {earlier.name for earlier in all_before(BY_NAME[name])}
    return [candidate for candidate in STAGES if candidate.name in names]
