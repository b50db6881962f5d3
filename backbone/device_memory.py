"""How much memory a step may plan with: little in a computer's main memory, a share of what a GPU has free."""

from __future__ import annotations

import torch


def room(device: torch.device, least: int, share: float) -> int:
    """Bytes: `least`, or on a CUDA device a share of its free memory where that is more.

    A GPU that is given parts as small as suit a CPU waits for them: the time of a pass over few tokens is that of
    launching it.
    """
    if device.type != "cuda":
        return least
    free, _ = torch.cuda.mem_get_info(device)
    return max(least, int(free * share))
