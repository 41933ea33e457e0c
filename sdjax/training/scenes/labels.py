"""A scene's attributes as numbers: what the measure learns to read."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from sdjax.training.scenes.canvas import UNITS
from sdjax.training.scenes.draw import draw
from sdjax.training.scenes.layout import layout
from sdjax.training.scenes.world import (
    COLOURS,
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


def examples(seed: int, indices: Iterable[int]) -> dict[str, np.ndarray]:
    """A batch to learn from: `pixels` uint8 [b, 128, 128, 3], their `labels` and `spots`."""
    scenes = [scene(seed, index) for index in indices]
    return {
        "pixels": np.stack([draw(drawn) for drawn in scenes]),
        "labels": np.stack([labels(drawn) for drawn in scenes]),
        "spots": np.stack([spots(drawn) for drawn in scenes]),
    }
