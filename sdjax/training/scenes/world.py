"""`scene(seed, index)`: what is in one picture of the world, exactly."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

TIMES = ("dawn", "day", "sunset", "night")
WEATHERS = ("clear", "cloudy", "rain", "snow", "fog")
TERRAINS = ("hills", "mountains", "forest", "desert", "city")
WATERS = ("none", "sea", "lake", "river")
SKIES = ("none", "sun", "moon", "rainbow", "aurora")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
PLACES = ("left", "middle", "right")
COUNTS = (1, 2, 3)


Number = float | int


class Kind(NamedTuple):
    """A kind of object: its size in units, 128 of which are a picture's shorter side."""

    width: Number
    height: Number
    band: str
    """Where it lives: on the ground, on water (in front of it stands the ground) or in the air."""


KINDS = {
    "house": Kind(30, 29, "ground"),
    "tree": Kind(26, 36, "ground"),
    "tower": Kind(21, 44, "ground"),
    "tent": Kind(32, 22, "ground"),
    "car": Kind(36, 19, "ground"),
    "boat": Kind(30, 32, "water"),
    "balloon": Kind(26, 37, "air"),
    "kite": Kind(25, 38, "air"),
}

GAP = 1.07
"""The distance between neighbours in a group, in widths."""
SMALLEST = 0.72
"""Objects are never drawn smaller than this share of their size."""
HALF, WHOLE = 61.0, 122.0
"""Units that a group may take when it stands to one side, and when it stands in the middle."""


@dataclass(frozen=True)
class Group:
    """One to three equal objects side by side."""

    kind: str
    colour: str
    count: int
    place: str

    @property
    def width(self) -> Number:
        """The group's width in units at full size."""
        return KINDS[self.kind].width * (1 + GAP * (self.count - 1))


@dataclass(frozen=True)
class Scene:
    """All that a picture shows; `detail` seeds what has no name, such as the lie of the land."""

    time: str
    weather: str
    terrain: str
    water: str
    sky: str
    groups: tuple[Group, ...]
    detail: int


def scene(seed: int, index: int) -> Scene:
    """Draw scene `index` of the world `seed`; any other seed is held out from this one.

    Both are non-negative. Attributes are independent but for what the world forbids: the sun does
    not shine at night, boats need a sea or a lake, snow does not fall on the desert, and two groups
    side by side stand left and right.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, index))))

    def choose(names: tuple, weights: tuple[float, ...]):
        total = np.cumsum(weights)
        return names[int(np.searchsorted(total / total[-1], rng.random(), side="right"))]

    time = choose(TIMES, (0.18, 0.32, 0.25, 0.25))
    weather = choose(WEATHERS, (0.34, 0.22, 0.15, 0.14, 0.15))
    dry = weather == "snow"
    terrain = choose(TERRAINS, (0.2, 0.22, 0.2, 0.0 if dry else 0.18, 0.2))
    water = choose(WATERS, (0.34, 0.26, 0.2, 0.2))
    kinds = [str(kind) for kind in rng.permutation([kind for kind in KINDS if kind != "boat"])]
    if water in ("sea", "lake") and rng.random() < 0.42:
        kinds.insert(int(rng.integers(2)), "boat")
    number = choose((0, 1, 2), (0.07, 0.53, 0.40))
    picked = kinds[:number]
    groups = _groups(picked, rng)
    crowded = sum(KINDS[group.kind].band == "air" for group in groups) == 2
    sky = choose(SKIES, _sky_weights(time, weather, crowded))
    return Scene(time, weather, terrain, water, sky, groups, int(rng.integers(2**62)))


def _sky_weights(time: str, weather: str, crowded: bool) -> tuple[float, ...]:
    """How often each of SKIES shows; two groups in the air leave no room for sun or moon."""
    open_sky = weather in ("clear", "cloudy")
    disc = 0.0 if crowded else 0.5
    if time == "night":
        moon = disc if open_sky or weather == "snow" else 0.0
        return (0.25, 0.0, moon, 0.0, 0.5 if weather == "clear" else 0.0)
    rainbow = 0.2 if time == "day" and (open_sky or weather == "rain") else 0.0
    return (0.35, disc if open_sky else 0.0, 0.0, rainbow, 0.0)


def _groups(kinds: list[str], rng: np.random.Generator) -> tuple[Group, ...]:
    """Colours, counts and places for these kinds, so that all of them fit."""
    bands = ["air" if KINDS[kind].band == "air" else "ground" for kind in kinds]
    shared = len(kinds) == 2 and bands[0] == bands[1]
    sides = rng.permutation(["left", "right"])
    colours = rng.permutation(COLOURS)
    groups = []
    for n, kind in enumerate(kinds):
        counts = COUNTS if n == 0 else (1, 1, 2)
        count = int(counts[rng.integers(3)])
        place = str(sides[n] if shared else PLACES[rng.integers(3)])
        group = Group(kind, str(colours[n]), count, place)
        while shared and group.width * SMALLEST > HALF:
            group = Group(kind, group.colour, group.count - 1, place)
        if group.place != "middle" and group.width * SMALLEST > HALF:
            group = Group(kind, group.colour, count, "middle")
        groups.append(group)
    return tuple(groups)
