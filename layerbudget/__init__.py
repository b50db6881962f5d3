"""Learn how many decoder layers each prompt needs, and run only those.

The public names resolve when first used, so that `import layerbudget` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbone.errors import ArtefactError as ArtefactError
    from backbone.errors import InputError as InputError
    from backbone.errors import LoadError as LoadError
    from backbone.errors import PlanError as PlanError
    from backbone.errors import UnsupportedGenerationError as UnsupportedGenerationError
    from backbone.errors import UnsupportedModelError as UnsupportedModelError
    from backbone.errors import WrongModelError as WrongModelError
    from backbone.execution.apply_plan import apply_plan as apply_plan
    from backbone.execution.apply_plan import apply_plans as apply_plans
    from backbone.healing.healing import Healing as Healing
    from backbone.loading import load_backbone as load_backbone
    from backbone.plan import LayerPlan as LayerPlan
    from backbone.plan import PlanMenu as PlanMenu
    from backbone.testing import FamilyConformance as FamilyConformance
    from controller.base import Controller as Controller
    from controller.base import LearningError as LearningError
    from controller.testing import ControllerConformance as ControllerConformance
    from oracle.chat import ChatError as ChatError
    from oracle.menus.base import MenuTask as MenuTask
    from oracle.prompt_sources import embedded_prompts as embedded_prompts
    from oracle.search.base import Searcher as Searcher
    from oracle.search.testing import SearcherConformance as SearcherConformance
    from pipelines.training import train as train
    from runtime.allocator import Allocator as Allocator
    from runtime.generate_arguments import UncertifiedDecodingWarning as UncertifiedDecodingWarning
    from runtime.output import AllocatedBeamOutput as AllocatedBeamOutput
    from runtime.output import AllocatedOutput as AllocatedOutput
    from runtime.output import check_layers as check_layers
    from runtime.plan_selection import FullPlanWarning as FullPlanWarning

    __version__: str

PACKAGES = ("backbone", "oracle", "controller", "runtime", "token_exits", "pipelines", "serving")
_NAMES = {
    "backbone.errors": (
        "ArtefactError",
        "InputError",
        "LoadError",
        "PlanError",
        "UnsupportedGenerationError",
        "UnsupportedModelError",
        "WrongModelError",
    ),
    "backbone.execution.apply_plan": ("apply_plan", "apply_plans"),
    "backbone.loading": ("load_backbone",),
    "backbone.plan": ("LayerPlan", "PlanMenu"),
    "backbone.healing.healing": ("Healing",),
    "backbone.testing": ("FamilyConformance",),
    "controller.base": ("Controller", "LearningError"),
    "controller.testing": ("ControllerConformance",),
    "oracle.chat": ("ChatError",),
    "oracle.menus.base": ("MenuTask",),
    "oracle.prompt_sources": ("embedded_prompts",),
    "oracle.search.base": ("Searcher",),
    "oracle.search.testing": ("SearcherConformance",),
    "pipelines.training": ("train",),
    "runtime.allocator": ("Allocator",),
    "runtime.plan_selection": ("FullPlanWarning",),
    "runtime.generate_arguments": ("UncertifiedDecodingWarning",),
    "runtime.output": ("AllocatedBeamOutput", "AllocatedOutput", "check_layers"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("layerbudget")
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
