"""Where a checkpoint lies, and what its configs and headers alone say: all that needs no jax."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sdjax import bundled
from sdjax.checkpoints import folder, hub
from sdjax.checkpoints.tensors import Tensors
from sdjax.errors import InputError


class Found(NamedTuple):
    """A checkpoint whose configs and headers have been read."""

    path: Path
    opened: folder.Folder | folder.Component | Tensors
    """A diffusers folder, the folder of an autoencoder alone, or a single file."""


def find(
    where: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Found:
    """Find a checkpoint and open it; arguments and errors are those of `load`.

    Raises:
        InputError: what is wrong with files, configs and headers by themselves.
    """
    path = bundled.place(where)
    with readable(path):
        if not path.exists() and not path.is_symlink() and hub.is_id(os.fspath(where)):
            path = hub.download(os.fspath(where), variant)
        if not path.is_dir():
            if variant is not None:
                raise InputError(f"variant is for folders, and {path} is not one: leave it out")
            return Found(path, folder.read(path))
        for name, value in (("config", config), ("ema", ema)):
            if value:
                raise InputError(
                    f"{name} is for single files, and {path} is a folder, whose own files say: "
                    "leave it out"
                )
        path = folder.snapshot(path)
        alone = folder.autoencoder(path, variant)
        return Found(path, folder.open(path, variant) if alone is None else alone)


def look(where: str | os.PathLike, **options: Any) -> None:
    """Refuse what `find` refuses, but for a Hub id, which would be asked for twice.

    A command looks before it imports jax, which takes longer.
    """
    if os.path.lexists(bundled.place(where)) or not hub.is_id(os.fspath(where)):
        find(where, **options)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Say what the system refuses to read."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or path} cannot be read ({error.strerror or error}): check the path "
            "and its mode"
        ) from None
