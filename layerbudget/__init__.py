"""Learn how many decoder layers each prompt needs, and run only those.

The public names resolve when first used, so that `import layerbudget` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbone.execution.apply_plan import apply_plan
    from backbone.loading import load_backbone
    from backbone.plan import LayerPlan, PlanMenu
    from backbone.stand_ins.attaching import StandIns, attach, detach
    from runtime.allocator import Allocator

__all__ = ["Allocator", "LayerPlan", "PlanMenu", "StandIns", "apply_plan", "attach", "detach", "load_backbone"]

PACKAGES = ("backbone", "oracle", "controller", "runtime", "pipelines")
_HOMES = {
    "Allocator": "runtime.allocator",
    "LayerPlan": "backbone.plan",
    "PlanMenu": "backbone.plan",
    "StandIns": "backbone.stand_ins.attaching",
    "apply_plan": "backbone.execution.apply_plan",
    "attach": "backbone.stand_ins.attaching",
    "detach": "backbone.stand_ins.attaching",
    "load_backbone": "backbone.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerbudget' has no attribute {name!r}")
    check_not_shadowed()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def check_not_shadowed() -> None:
    """Raises ImportError if somebody else's module stands before one of layerbudget's packages on `sys.path`."""
    root = Path(__file__).resolve().parent.parent
    for package in PACKAGES:
        spec = find_spec(package)
        found = Path(str(spec.origin)).resolve() if spec and spec.origin else None
        if found != root / package / "__init__.py":
            raise ImportError(
                f"layerbudget needs its own package {package!r} at {root / package}, but Python finds "
                f"{found or 'none'}; rename that module or take its folder off sys.path"
            )
