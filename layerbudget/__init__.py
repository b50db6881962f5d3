"""Learn how many decoder layers each prompt needs, and run only those.

The public names resolve when first used, so that `import layerbudget` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbone.execution.apply_plan import apply_plan as apply_plan
    from backbone.execution.apply_plan import apply_plans as apply_plans
    from backbone.loading import load_backbone as load_backbone
    from backbone.plan import LayerPlan as LayerPlan
    from backbone.plan import PlanMenu as PlanMenu
    from backbone.stand_ins.attaching import StandIns as StandIns
    from backbone.stand_ins.attaching import attach as attach
    from backbone.stand_ins.attaching import detach as detach
    from backbone.testing import FamilyConformance as FamilyConformance
    from controller.base import Controller as Controller
    from controller.base import LearningError as LearningError
    from controller.testing import ControllerConformance as ControllerConformance
    from oracle.menus.base import MenuTask as MenuTask
    from oracle.search.base import Searcher as Searcher
    from oracle.search.testing import SearcherConformance as SearcherConformance
    from runtime.allocator import Allocator as Allocator

PACKAGES = ("backbone", "oracle", "controller", "runtime", "pipelines")
_HOMES = {
    "Allocator": "runtime.allocator",
    "Controller": "controller.base",
    "ControllerConformance": "controller.testing",
    "FamilyConformance": "backbone.testing",
    "LayerPlan": "backbone.plan",
    "LearningError": "controller.base",
    "MenuTask": "oracle.menus.base",
    "PlanMenu": "backbone.plan",
    "Searcher": "oracle.search.base",
    "SearcherConformance": "oracle.search.testing",
    "StandIns": "backbone.stand_ins.attaching",
    "apply_plan": "backbone.execution.apply_plan",
    "apply_plans": "backbone.execution.apply_plan",
    "attach": "backbone.stand_ins.attaching",
    "detach": "backbone.stand_ins.attaching",
    "load_backbone": "backbone.loading",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'layerbudget' has no attribute {name!r}")
    check_not_shadowed()
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def check_not_shadowed() -> None:
    """Raises ImportError if somebody else's module stands before one of layerbudget's packages on `sys.path`.

    Only in the project itself: a wheel carries the packages under `layerbudget`, where nothing can (`setup.py`).
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / PACKAGES[0]).is_dir() and (root / "layerbudget" / PACKAGES[0]).is_dir():
        return
    for package in PACKAGES:
        spec = find_spec(package)
        found = Path(str(spec.origin)).resolve() if spec and spec.origin else None
        if found != root / package / "__init__.py":
            raise ImportError(
                f"layerbudget needs its own package {package!r} at {root / package}, but Python finds "
                f"{found or 'none'}; rename that module or take its folder off sys.path"
            )
