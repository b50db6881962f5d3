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
    from backbone.errors import InputError
    from backbone.execution.apply_plan import NestedPlanError, apply_plan
    from backbone.execution.cache import CacheMismatchError
    from backbone.execution.self_test import InexactPlanError
    from backbone.families import UnsupportedModelError
    from backbone.loading import LoadError, load_backbone
    from backbone.plan import LayerPlan, PlanError, PlanMenu
    from backbone.stand_ins.adapters import AdapterError
    from backbone.stand_ins.attaching import StandIns, attach, detach
    from backbone.stand_ins.tensors import StandInsError
    from runtime.allocator import Allocator
    from runtime.call_arguments import UnsupportedGenerationError
    from runtime.fitting_model import WrongModelError
    from runtime.saving.allocator_files import ArtefactError
    from runtime.saving.file_bundle import BundleError

    __version__: str

__all__ = [
    "AdapterError",
    "Allocator",
    "ArtefactError",
    "BundleError",
    "CacheMismatchError",
    "InexactPlanError",
    "InputError",
    "LayerPlan",
    "LoadError",
    "NestedPlanError",
    "PlanError",
    "PlanMenu",
    "StandIns",
    "StandInsError",
    "UnsupportedGenerationError",
    "UnsupportedModelError",
    "WrongModelError",
    "apply_plan",
    "attach",
    "detach",
    "load_backbone",
]

PACKAGES = ("backbone", "oracle", "controller", "runtime", "pipelines")
_HOMES = {
    "AdapterError": "backbone.stand_ins.adapters",
    "Allocator": "runtime.allocator",
    "ArtefactError": "runtime.saving.allocator_files",
    "BundleError": "runtime.saving.file_bundle",
    "CacheMismatchError": "backbone.execution.cache",
    "InexactPlanError": "backbone.execution.self_test",
    "InputError": "backbone.errors",
    "LayerPlan": "backbone.plan",
    "LoadError": "backbone.loading",
    "NestedPlanError": "backbone.execution.apply_plan",
    "PlanError": "backbone.plan",
    "PlanMenu": "backbone.plan",
    "StandIns": "backbone.stand_ins.attaching",
    "StandInsError": "backbone.stand_ins.tensors",
    "UnsupportedGenerationError": "runtime.call_arguments",
    "UnsupportedModelError": "backbone.families",
    "WrongModelError": "runtime.fitting_model",
    "apply_plan": "backbone.execution.apply_plan",
    "attach": "backbone.stand_ins.attaching",
    "detach": "backbone.stand_ins.attaching",
    "load_backbone": "backbone.loading",
}


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
