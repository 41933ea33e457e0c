"""The model that ships inside the package: its name and its place."""

import os
from pathlib import Path
from typing import Any

from sdjax.errors import InputError

NAME = "scenes"
"""What `load` and the command call it, whatever the working folder holds."""

ABOUT = "a small model of drawn landscapes that comes with sdjax"

HOME = Path(__file__).parent / "assets" / NAME
"""A diffusers folder, stored in float16."""


def is_named(where: Any) -> bool:
    """Whether this is the bundled model's name; `./scenes`, or any `Path`, is one's own folder."""
    return isinstance(where, str) and where == NAME


def is_meant(where: str | os.PathLike) -> bool:
    """Whether a model is the bundled one, given by its name or by its path."""
    return is_named(where) or os.path.realpath(where) == os.path.realpath(HOME)


def folder() -> Path:
    """Where it is.

    Raises:
        InputError: a copy of sdjax without it.
    """
    if not (HOME / "model_index.json").is_file():
        raise InputError(
            f"the bundled model, {NAME}, is not in this copy of sdjax ({HOME}): name a checkpoint "
            "(--model PATH), a diffusers folder, a .safetensors or .ckpt file, or a hub id such as "
            "org/name"
        )
    return HOME


def place(where: str | os.PathLike) -> Path:
    """Where a model lies that is given by a path, or the bundled one by its name.

    Raises:
        InputError: a copy of sdjax without it.
    """
    return folder() if is_named(where) else Path(where)
