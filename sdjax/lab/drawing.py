"""Points in the plane as pictures."""

import colorsys

import numpy as np
from jaxtyping import Float, UInt8

SIDE = 168
_REACH = 1.9
"""Points farther out than this lie on the edge."""
_INK = (12, 14, 24)


def colours(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 3"]:
    """A hue for each direction from the middle, paler near it: 0..1."""
    hue = np.arctan2(points[:, 1], points[:, 0]) / (2 * np.pi) % 1
    strong = np.clip(np.linalg.norm(points, axis=-1) / 0.7, 0.15, 0.85)
    return np.array([colorsys.hsv_to_rgb(h, s, 1.0) for h, s in zip(hue, strong, strict=True)])


def points(
    places: Float[np.ndarray, "n 2"], inks: Float[np.ndarray, "n 3"], side: int = SIDE
) -> UInt8[np.ndarray, "side side 3"]:
    """Dots of light on dark, brighter where more of them lie; what is not finite is left out."""
    big = 2 * side
    light = np.zeros((big + 4, big + 4, 3))
    good = np.isfinite(places).all(-1)
    at = np.clip((places[good] / _REACH + 1) / 2, 0, 1) * (big - 1)
    column, row = np.round(at[:, 0]).astype(int) + 2, np.round(big - 1 - at[:, 1]).astype(int) + 2
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            share = 0.5 ** (abs(down) + abs(right))
            np.add.at(light, (row + down, column + right), share * inks[good])
    light = light[2:-2, 2:-2].reshape(side, 2, side, 2, 3).mean((1, 3))
    light = 1 - np.exp(-2.2 * light * np.sqrt(1000 / max(1, len(places))))
    ink = np.array(_INK) / 255
    return np.round(255 * (ink + (1 - ink) * light)).astype(np.uint8)
