"""Where a checkpoint lies, and what its configs and headers alone say: all that needs no jax."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdjax import bundled
from sdjax.checkpoints import folder, hub
from sdjax.checkpoints.tensors import Tensors
from sdjax.errors import InputError


@dataclass(frozen=True)
class Found(os.PathLike):
    """A checkpoint whose configs and headers have been read: a path that need not be read again."""

    where: str
    """As the user gave it."""
    path: Path
    opened: folder.Folder | folder.Component | Tensors
    """A diffusers folder, the folder of an autoencoder alone, or a single file."""

    def __fspath__(self) -> str:
        return self.where


def find(
    where: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    ema: bool = False,
    variant: str | None = None,
) -> Found:
    """Find a checkpoint and open it; arguments and errors are those of `load`.

    What is found already stays as it is.

    Raises:
        InputError: what is wrong with files, configs and headers by themselves.
    """
    if isinstance(where, Found):
        return where
    path = bundled.place(where)
    with readable(path):
        if not path.exists() and not path.is_symlink() and hub.is_id(os.fspath(where)):
            path = hub.download(os.fspath(where), variant)
        if not path.is_dir():
            if variant is not None:
                raise InputError(f"variant is for folders, and {path} is not one: leave it out")
            return Found(os.fspath(where), path, folder.read(path))
        for name, value in (("config", config), ("ema", ema)):
            if value:
                raise InputError(
                    f"{name} is for single files, and {path} is a folder, whose own files say: "
                    "leave it out"
                )
        path = folder.snapshot(path)
        alone = folder.autoencoder(path, variant)
        opened = folder.open(path, variant) if alone is None else alone
        return Found(os.fspath(where), path, opened)


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
