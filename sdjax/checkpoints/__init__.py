"""Files to params and back: every format in and out, without torch.

`load` and `save` are for people, `inspect` for the curious; the rest is what they are made of.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdjax.checkpoints.loading import load as load
    from sdjax.checkpoints.loading import load_vae as load_vae
    from sdjax.checkpoints.report import Report as Report
    from sdjax.checkpoints.report import inspect as inspect
    from sdjax.checkpoints.saving import save as save

__all__ = ["Report", "inspect", "load", "load_vae", "save"]

# Imported when first used: what reads headers refuses bad files before jax loads.
_HOME = {
    "Report": "report",
    "inspect": "report",
    "load": "loading",
    "load_vae": "loading",
    "save": "saving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
