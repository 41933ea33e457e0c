"""The shipped configs: one TOML a model, its tables the config.json files of a diffusers folder.

TOML has no null: a key that would be null is left out, as the networks' defaults say.
"""

import importlib.resources
import tomllib
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from sdjax.errors import InputError

Configs = dict[str, dict[str, Any]]
"""Folder name (`unet`, `vae`, `text_encoder`, `scheduler`, ... and `model_index`) to its config."""


def names() -> tuple[str, ...]:
    """The names that `read` knows, sorted."""
    stems = (f.name.removesuffix(".toml") for f in home().iterdir() if f.name.endswith(".toml"))
    return tuple(sorted(stems))


def read(name: str | Path) -> Configs:
    """Read a shipped config by its name, or a TOML file of the same form by its path.

    Fresh dicts at every call. InputError: no such name or file, TOML that does not parse, no table.
    """
    return {k: v for k, v in _parse(name).items() if isinstance(v, dict)}


def _parse(name: str | Path) -> dict[str, Any]:
    if isinstance(name, str) and name in names():
        file: Traversable = home() / f"{name}.toml"
    elif Path(name).suffix == ".toml" and Path(name).is_file():
        file = Path(name)
    else:
        raise InputError(
            f"config {str(name)!r} is neither a shipped config ({', '.join(names())}) "
            "nor the path of a .toml file"
        )
    try:
        parsed = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config {str(name)!r} is not valid TOML: {error}") from None
    if not any(isinstance(table, dict) for table in parsed.values()):
        raise InputError(
            f"config {str(name)!r} has no tables: it needs [vae], and for a UNet [unet] and "
            "[scheduler]"
        )
    return parsed


def home() -> Traversable:
    """`sdjax/configs` in a wheel, `configs` beside `sdjax` in a source tree."""
    package = importlib.resources.files("sdjax")
    shipped = package / "configs"
    return shipped if shipped.is_dir() else Path(str(package)).parent / "configs"
