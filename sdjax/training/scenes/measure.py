"""How well pictures follow their prompts: attributes read from pixels alone.

The measure's own error, on 3,000 renders at 128x128 of a seed that it has not seen: 0.30 % of
images have an attribute that their caption asks for read wrongly, 0.43 % any attribute at all
(water 0.20 %, weather and sky 0.10 %, terrain, objects and counts 0.03 %, time, colour and place
none). When the same renders are shifted, blurred, coarsened, tinted and roughened as in training:
1.03 % any.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from sdjax.checkpoints import safetensors
from sdjax.errors import InputError
from sdjax.model import Params
from sdjax.training.scenes.asked import Asked, asked
from sdjax.training.scenes.labels import VIEWS
from sdjax.training.scenes.reader import shrink
from sdjax.training.scenes.reading import apply
from sdjax.training.scenes.world import COLOURS, KINDS, PLACES, Group

WEIGHTS = Path(__file__).parents[2] / "assets" / "scenes_measure" / "measure.safetensors"
_BATCH = 50


@dataclass(frozen=True)
class Seen:
    """What the measure sees in a picture: a scene's attributes, with no more than its pixels."""

    time: str
    weather: str
    terrain: str
    water: str
    sky: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Score:
    """Of all that prompts asked for, how much the pictures show."""

    right: dict[str, int]
    """By attribute, how often what was asked for is there."""
    asked: dict[str, int]
    """By attribute, how often it was asked for."""
    images: tuple[bool, ...]
    """For every image, whether all that was asked for is there."""

    @property
    def share(self) -> float:
        """The share of images with all asked attributes right."""
        return sum(self.images) / len(self.images)

    def __str__(self) -> str:
        lines = [
            f"{name:8} {100 * self.right[name] / n:6.2f} % of {n}"
            for name, n in self.asked.items()
            if n
        ]
        return "\n".join([*lines, f"{'all':8} {100 * self.share:6.2f} % of {len(self.images)}"])


def measure(images: UInt8[np.ndarray, "b h w 3"]) -> list[Seen]:
    """Read every attribute of square pictures.

    Raises:
        InputError: when they are not square, or smaller than 64 pixels.
    """
    b, h, w, _ = images.shape
    if h != w or h < 64:
        raise InputError(
            f"the measure reads square pictures of at least 64 pixels a side, got {h}x{w}: "
            "cut a square out"
        )
    params = weights()
    seen = []
    for start in range(0, b, _BATCH):
        part = np.asarray(images[start : start + _BATCH])
        more = np.zeros((min(_BATCH, b) - len(part), h, w, 3), np.uint8)
        views, count, colour, place = jax.device_get(_read(params, np.concatenate([part, more])))
        for n in range(len(part)):
            seen.append(_seen([v[n] for v in views], count[n], colour[n], place[n]))
    return seen


def score(prompts: Sequence[str | Asked], images: UInt8[np.ndarray, "b h w 3"]) -> Score:
    """Compare each image with what its prompt asks for; what it does not mention is free.

    Attributes are time, weather, terrain, water, sky, and for each group of objects that a prompt
    names: whether it is there ("object"), its count, colour and place.
    """
    if len(prompts) != len(images):
        raise InputError(
            f"each image needs its prompt, got {len(prompts)} for {len(images)} images"
        )
    right = dict.fromkeys((*VIEWS, "object", "count", "colour", "place"), 0)
    total = dict(right)
    whole = []
    for prompt, seen in zip(prompts, measure(images), strict=True):
        wanted = asked(prompt) if isinstance(prompt, str) else prompt
        answers = list(compare(wanted, seen))
        for name, correct in answers:
            right[name] += correct
            total[name] += 1
        whole.append(all(correct for _, correct in answers))
    return Score(right, total, tuple(whole))


def compare(wanted: Asked, seen: Any) -> list[tuple[str, bool]]:
    """Every attribute asked for, and whether a `Seen` (or a `Scene`) has it."""
    answers = [
        (name, getattr(seen, name) == getattr(wanted, name))
        for name in VIEWS
        if getattr(wanted, name) is not None
    ]
    groups = {group.kind: group for group in seen.groups}
    for want in wanted.groups:
        group = groups.get(want.kind)
        answers.append(("object", group is not None))
        for name in ("count", "colour", "place"):
            value = getattr(want, name)
            if value is not None:
                answers.append((name, group is not None and getattr(group, name) == value))
    return answers


def _seen(views: list[Any], count: Any, colour: Any, place: Any) -> Seen:
    values = {name: VIEWS[name][int(n)] for name, n in zip(VIEWS, views, strict=True)}
    groups = [
        Group(kind, COLOURS[int(colour[n])], int(count[n]), PLACES[int(place[n])])
        for n, kind in enumerate(KINDS)
        if count[n] > 0
    ]
    return Seen(**values, groups=tuple(groups))


@jax.jit
def _read(params: Params, images: Any) -> Any:
    read = apply(params, shrink(images.astype(jnp.float32)) / 127.5 - 1)
    best = [view.argmax(-1) for view in read.views]
    return best, read.counts.argmax(-1), read.colours.argmax(-1), read.places.argmax(-1)


@functools.cache
def weights() -> Params:
    """The reader's params, float32, from the file that ships with the package."""
    params: dict[str, Any] = {}
    for key, tensor in safetensors.open(WEIGHTS).items():
        *path, name = key.split(".")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[name] = np.asarray(tensor.read(), np.float32)
    return params


def save(params: Params, path: Path = WEIGHTS) -> None:
    """Write the reader's params as float16, under their own names."""
    entries = []
    for keys, array in jax.tree_util.tree_leaves_with_path(params):
        half = np.asarray(array, np.float16)
        name = ".".join(key.key for key in keys)
        entries.append(
            safetensors.Entry(name, half.shape, half.dtype, functools.partial(np.asarray, half))
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.write(path, entries, {"format": "sdjax"})
