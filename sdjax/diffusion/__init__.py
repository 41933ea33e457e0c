"""The mathematics: noise schedules, samplers, guidance. Nothing here knows a network."""

import importlib
import pkgutil
from typing import Any

_MODULES = {module.name for module in pkgutil.iter_modules(__path__)}


def __getattr__(name: str) -> Any:
    """Modules are imported when first named (PEP 562): `sdjax.diffusion.profiles`, say."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted(_MODULES)
