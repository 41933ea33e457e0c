"""Where a scene's objects stand: numbers in units, the same at every size."""

from typing import NamedTuple

import numpy as np

from sdjax.training.scenes.world import GAP, HALF, KINDS, WHOLE, Group, Number, Scene


class Place(NamedTuple):
    """One object: the middle of its foot, and its size as a share of its kind's."""

    group: Group
    x: Number
    y: Number
    size: Number
    mirrored: bool


def layout(scene: Scene, width: Number, height: Number, rng: np.random.Generator) -> list[Place]:
    """Every object of a picture that is width x height units, the furthest first."""
    bands = [KINDS[group.kind].band == "air" for group in scene.groups]
    places = []
    for group in scene.groups:
        band = KINDS[group.kind].band
        shared = bands.count(band == "air") == 2
        at_side = shared or group.place != "middle"
        largest = 1.12 if group.count == 1 else 1.0 if group.count == 2 else 0.9
        if shared:
            largest *= 0.92
        size = min(largest, (HALF if at_side else WHOLE) / group.width)
        size *= 1 - 0.08 * rng.random() if size > 0.85 else 1.0
        total = group.width * size
        slack = _slack(total, at_side)
        centre = _centre(group, total / 2 + slack, width, at_side) + slack * rng.uniform(-1, 1)
        foot = _foot(scene, band, height, KINDS[group.kind].height * size) + rng.uniform(-1.5, 1.5)
        step = KINDS[group.kind].width * size * GAP
        lift = rng.uniform(-1, 1, 3) * (3.0 if band == "air" else 1.2)
        for n in range(group.count):
            x = centre + step * (n - (group.count - 1) / 2)
            places.append(Place(group, x, foot + float(lift[n]), size, n % 2 == 1))
    return sorted(places, key=lambda place: (KINDS[place.group.kind].band == "ground", place.y))


def _centre(group: Group, reach: Number, width: Number, at_side: bool) -> float:
    if not at_side:
        return width / 2
    inset = max(0.2 * width, reach + 1)
    return inset if group.place == "left" else width - inset


def _slack(total: Number, at_side: bool) -> float:
    """How far a group may stray without leaving its place."""
    return max(0.0, min(5.0, (HALF - total) / 4)) if at_side else max(0.0, min(5.0, 61 - total / 2))


def _foot(scene: Scene, band: str, height: Number, tall: Number) -> float:
    if band == "water":
        return height * (0.69 if scene.water == "sea" else 0.695)
    if band == "air":
        return height * 0.29 + tall / 2
    return height * 0.88
