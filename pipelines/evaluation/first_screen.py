"""The sentences of the report's first screen, from metrics.json alone; none says what the metrics contradict."""

from __future__ import annotations

from pipelines.evaluation.summary import Metrics, changes, exceeds_limit, judges, percent, rival, saves, times


def headline(metrics: Metrics) -> str:
    """What the run is worth: savings only where no rival has them too."""
    if metrics["certificate"]["price"] is None:
        return "Nothing could be saved with certainty"
    if not saves(metrics):
        return "Every prompt still runs all layers"
    if (other := rival(metrics)) is not None:
        return f"No gain shown over {other}"
    return f"{_less(metrics)} to compute in the layers{_quality_kept(metrics)}"


def lead(metrics: Metrics) -> str:
    """How many layers a prompt gets, and by what."""
    if metrics["certificate"]["price"] is None:
        return "No way to leave some of them out could be shown to be safe here, so it still does."
    if not saves(metrics):
        return "Here the certified price leaves nothing out, so it still does."
    ran = f"Here a prompt runs {metrics[metrics['best']]['layers']:.1f} of them on average"
    if (other := rival(metrics)) is not None:
        return f"{ran}; which prompts run fewer is not shown to matter beyond {other}."
    return f"{ran}, fewer where that costs little and more where it would cost much."


def layers_tile(metrics: Metrics) -> str:
    """What is saved in layers and in time."""
    if not saves(metrics):
        return "All layers run for every prompt, so that nothing gets faster."
    single, batch, speed = *(metrics["speed"]["intervals"][how] for how in ("single", "batch")), metrics["speed"]
    text = f"to compute in the layers, on the average of {metrics['prompts']['test']} prompts."
    if single["low"] is None:
        return f"{text} Too few rounds were timed to say how much faster that is."
    if exceeds_limit(metrics):
        return f"{text} The measured speed exceeds what the layers left out allow, so that it is noise."
    text += f" On this machine answers come {times(single)} as fast as without, one prompt at a time"
    if not single["exceeds_noise"]:
        return f"{text}: too near to the noise to say more."
    text += f", where leaving out these layers allows {times(speed['limit'])}"
    return text + (f", and {times(batch)} in a batch of {speed['prompts']}." if batch["exceeds_noise"] else ".")


def quality_tile(metrics: Metrics) -> str:
    """What the quality is counted in and what its mean hides."""
    kept, prompts = metrics["intervals"]["kept"], metrics["prompts"]["test"]
    text = f"of the full model's mean score, on {prompts} prompts that nothing here had seen"
    if saves(metrics) and kept["low"] is not None:
        text += (
            f"; with other prompts of these kinds it could have been {percent(kept['low'])} to {percent(kept['high'])}"
        )
    return f"{text}. {judges(metrics)}{f' {changes(metrics)}' if saves(metrics) else ''}"


def _less(metrics: Metrics) -> str:
    return f"{percent(1 - metrics[metrics['best']]['budget'])} less"


def _quality_kept(metrics: Metrics) -> str:
    if metrics["intervals"]["kept"]["low"] is None:
        return ""
    return f", {percent(metrics[metrics['best']]['quality_ratio'])} of the quality"


def numbers(metrics: Metrics) -> dict[str, str]:
    """The figures that stand large on the two tiles."""
    kept = metrics["intervals"]["kept"]["low"] is not None
    return {
        "layers": _less(metrics) if saves(metrics) else "nothing saved",
        "quality": f"{percent(metrics[metrics['best']]['quality_ratio'], 1)} kept" if kept else "not measurable",
    }
