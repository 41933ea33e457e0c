"""`sdjax convert`: a checkpoint in another form."""

import argparse
import os
from pathlib import Path

from sdjax import bundled
from sdjax.checkpoints.finding import find
from sdjax.cli.request import DTYPES, known
from sdjax.cli.show import Progress, say
from sdjax.errors import InputError


def run(asked: argparse.Namespace) -> None:
    """Check what can be checked, then load and save."""
    dtype = known("dtype", asked.dtype, DTYPES)
    out = Path(asked.out)
    if os.path.lexists(out):
        if not asked.overwrite and not (out.is_dir() and not any(out.iterdir())):
            raise InputError(f"{out} is there already: give another name, or --overwrite")
        place = bundled.HOME if bundled.is_named(asked.path) else asked.path
        if os.path.exists(place) and os.path.realpath(place) == os.path.realpath(out):
            raise InputError(f"{out} is what is to be converted: give another name")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out.absolute().parent} is not a folder: make it first")
    found = find(asked.path, config=asked.config, ema=asked.ema, variant=asked.variant)
    import sdjax

    progress = Progress()
    try:
        model, params = sdjax.load(
            found,
            dtype=dtype,
            config=asked.config,
            ema=asked.ema,
            variant=asked.variant,
            progress=progress.loading,
        )
    finally:
        progress.close()
    try:
        say(str(sdjax.save(out, model, params, overwrite=asked.overwrite)))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from None
