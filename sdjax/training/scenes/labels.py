"""A scene's attributes as numbers: what the measure learns to read."""

import numpy as np
from jaxtyping import Float, Int

from sdjax.text import Tokenizer
from sdjax.training.scenes.asked import Asked, asked
from sdjax.training.scenes.canvas import UNITS
from sdjax.training.scenes.caption import caption
from sdjax.training.scenes.draw import draw
from sdjax.training.scenes.layout import layout
from sdjax.training.scenes.world import (
    COLOURS,
    COUNTS,
    KINDS,
    PLACES,
    SKIES,
    TERRAINS,
    TIMES,
    WATERS,
    WEATHERS,
    Scene,
    scene,
)

VIEWS = {"time": TIMES, "weather": WEATHERS, "terrain": TERRAINS, "water": WATERS, "sky": SKIES}
"""The attributes of the whole picture."""
GRID = 16
"""Cells of the map of objects, a side."""
WISHES = (
    *(len(values) + 1 for values in VIEWS.values()),
    *(len(COUNTS) + 2, len(COLOURS) + 1, len(PLACES) + 1) * len(KINDS),
)
"""How many values each of `wishes` can have."""


def labels(shown: Scene) -> Int[np.ndarray, " n"]:
    """One number for each of VIEWS, then count, colour and place of every kind; -1 where none."""
    views = [values.index(getattr(shown, name)) for name, values in VIEWS.items()]
    things = np.tile([0, -1, -1], (len(KINDS), 1))
    for group in shown.groups:
        things[list(KINDS).index(group.kind)] = (
            group.count,
            COLOURS.index(group.colour),
            PLACES.index(group.place),
        )
    return np.concatenate([views, things.reshape(-1)]).astype(np.int32)


def wishes(wanted: Asked) -> Int[np.ndarray, " n"]:
    """What a prompt asks for, in the order of `labels`: 0 where it leaves it free.

    A kind's count is 0 where the prompt does not name the kind, 1 to 3, or 4: some.
    """
    views = [
        0 if (value := getattr(wanted, name)) is None else 1 + values.index(value)
        for name, values in VIEWS.items()
    ]
    things = np.zeros((len(KINDS), 3), int)
    for group in wanted.groups:
        things[list(KINDS).index(group.kind)] = (
            group.count or len(COUNTS) + 1,
            0 if group.colour is None else 1 + COLOURS.index(group.colour),
            0 if group.place is None else 1 + PLACES.index(group.place),
        )
    return np.concatenate([views, things.reshape(-1)]).astype(np.int32)


def spots(shown: Scene) -> Float[np.ndarray, "y x kinds"]:
    """Where the objects' middles are in a square picture: one object's cells sum to 1."""
    grid = np.zeros((GRID + 2, GRID + 2, len(KINDS)), np.float32)
    rng = np.random.Generator(np.random.Philox(shown.detail))
    for place in layout(shown, UNITS, UNITS, rng):
        kind = list(KINDS).index(place.group.kind)
        tall = KINDS[place.group.kind].height * place.size
        x, y = (v * GRID / UNITS + 0.5 for v in (place.x, place.y - tall / 2))
        i, j = int(y), int(x)
        for row, down in ((i, 1 - (y - i)), (i + 1, y - i)):
            for column, across in ((j, 1 - (x - j)), (j + 1, x - j)):
                grid[row, column, kind] += down * across
    return grid[1:-1, 1:-1]


def seen(seed: int, index: int) -> dict[str, np.ndarray]:
    """A picture to learn to read: `pixels` uint8 [128, 128, 3], its `labels` and `spots`."""
    drawn = scene(seed, index)
    return {"pixels": draw(drawn), "labels": labels(drawn), "spots": spots(drawn)}


def heard(tokenizer: Tokenizer, seed: int, index: int) -> dict[str, np.ndarray]:
    """A caption to learn to understand: `ids` int32 [s], and what it asks for as `labels`."""
    said = caption(scene(seed, index), index)
    return {"ids": tokenizer([said]).ids[0].astype(np.int32), "labels": wishes(asked(said))}
