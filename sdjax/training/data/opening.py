"""`open`: a source from a name, a path or a list of them."""

import functools
from collections.abc import Sequence
from pathlib import Path

from sdjax.errors import InputError
from sdjax.training.data import folder as folders
from sdjax.training.data.source import Drawn, Example, Joined, Source
from sdjax.training.data.tars import Tars, expand

_METADATA = ("metadata.jsonl", "metadata.csv")


def open(
    where: str | Path | Sequence[str | Path],
    *,
    caption_column: str | None = "text",
    height: int = 128,
    width: int = 128,
    seed: int = 0,
    length: int | None = None,
) -> Source:
    """The examples at `where`: a folder of images, WebDataset's tars, or the world `scenes`.

    A folder: see `Folder`; one that holds only tars stands for them. Tars: a path, a pattern with
    braces (`train-{0000..0123}.tar`) or a glob, see `Tars`. A list of all these: one after another.
    `caption_column=None`: pictures only, their captions empty. `height`, `width`, `seed` and
    `length` are for `scenes` alone, which is endless without a length; another seed is another
    world, so held-out scenes come from another seed.
    """
    if not isinstance(where, str | Path):
        if not where:
            raise InputError("no data: name a folder, tars or scenes")
        again = functools.partial(
            open,
            caption_column=caption_column,
            height=height,
            width=width,
            seed=seed,
            length=length,
        )
        opened = [again(w) for w in where]
        return opened[0] if len(opened) == 1 else Joined(opened)
    text = str(where)
    if text == "scenes" and not Path(text).exists():
        return scenes(seed, height, width, length)
    if "://" in text or text.startswith("pipe:"):
        raise InputError(f"{text} is no file: download or mount the data, and name its path")
    if Path(text).is_dir():
        tars = sorted(map(str, Path(text).glob("*.tar")))
        if not tars or any(Path(text, name).exists() for name in _METADATA):
            return folders.Folder(text, caption_column)
        return Tars(tars, caption_column)
    if not any(c in text for c in "{*?[") and not Path(text).exists():
        raise InputError(f"{text} is neither a folder nor a file, nor `scenes`")
    return Tars(expand(text), caption_column)


def scenes(seed: int, height: int, width: int, length: int | None = None) -> Drawn:
    """The drawn world of `training.scenes`, one scene a number, each with one of its captions."""
    make = functools.partial(_scene, seed, height, width)
    return Drawn(make, length, digest=f"scenes {width}x{height} of seed {seed}")


def _scene(seed: int, height: int, width: int, index: int) -> Example:
    from sdjax.training import scenes

    scene = scenes.scene(seed, index)
    pixels = scenes.draw(scene, height, width)
    return Example(pixels, scenes.caption(scene, index), f"scene {index} of seed {seed}")
