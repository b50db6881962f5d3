"""The report's page: what makes it readable on a narrow screen and aloud."""

import re
from itertools import pairwise
from pathlib import Path

from pipelines.evaluation import figures
from pipelines.stages import report
from pipelines.stages.report import with_labels

FOLDER = Path(report.__file__).parent
TEMPLATE = "".join((FOLDER / name).read_text() for name in ("first_screen.html.j2", "report.html.j2"))


def test_every_cell_bears_the_heading_of_its_column() -> None:
    head, row = "<tr><th>kind</th><th class='n'>of <b>full</b></th></tr>", "<tr><td>a</td><td class='n'>1</td></tr>"
    labelled = with_labels(f"<p><td></p><table>{head}{row}</table>")
    assert '<td data-label="kind">a</td>' in labelled
    assert "<td data-label=\"of full\" class='n'>1</td>" in labelled
    assert labelled.startswith("<p><td></p>"), "what is in no table stays"


def test_no_heading_skips_a_level() -> None:
    levels = [int(level) for level in re.findall(r"<h([1-6])", TEMPLATE)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(level <= before + 1 for before, level in pairwise(levels))


def test_figures_share_one_style() -> None:
    drawn = [
        figures.layers_by_task({"a": (1.0, 2.0), "b": (2.0, 3.0)}, 4, "#123456"),
        figures.layers_of_prompts({"a": [1.0, 2.0], "b": [4.0]}, 4),
        figures.importance({"mlp": {"epochs": 0.7, "hidden": 0.3}}),
    ]
    for svg in drawn:
        assert figures.MUTED in svg, "ticks"
        assert "11px" in svg, "texts"
        assert not re.match(r"<svg[^>]* (width|height)=", svg), "scales with the page"
