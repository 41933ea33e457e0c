"""What stands at the horizon: hills, mountains, forest, desert or a city, paler with distance."""

from typing import Any

import numpy as np

from sdjax.training.scenes.canvas import Canvas, branch, f32, ridge, waves
from sdjax.training.scenes.palette import Palette
from sdjax.training.scenes.sprites import GLOW
from sdjax.training.scenes.world import Number, Scene

SNOW = f32((228, 236, 250))
GROUND = {
    "hills": ((176, 208, 118), (98, 164, 76)),
    "mountains": ((166, 188, 130), (98, 142, 96)),
    "forest": ((126, 164, 104), (70, 120, 78)),
    "desert": ((246, 214, 150), (226, 172, 102)),
    "city": ((186, 204, 160), (132, 172, 128)),
}
SHORE = ((246, 226, 176), (230, 202, 146))


def tint(colours: Palette, colour: Any, distance: Number, snow: Number = 0.0) -> np.ndarray:
    """A land colour (or several, [n, 3]) in this light, faded by distance and snowed on, 0..1."""
    lit = f32(colour)
    lit = (lit + snow * (SNOW - lit)) * colours.land
    return lit + f32(max(distance, min(1.0, distance + colours.fog * 0.42))) * (colours.haze - lit)


def paint_backdrop(c: Canvas, scene: Scene, colours: Palette, rng: np.random.Generator) -> None:
    """Paint the terrain above and down to the horizon."""
    _PAINT[scene.terrain](c, colours, rng, 0.85 if scene.weather == "snow" else 0.0)


def _hills(c: Canvas, colours: Palette, rng: np.random.Generator, snow: Number) -> None:
    for distance, base, swing, length, colour in (
        (0.6, 15, 7, 110, (96, 156, 132)),
        (0.36, 9, 5, 80, (104, 168, 98)),
        (0.12, 3.5, 3.5, 62, (122, 184, 84)),
    ):
        edge = c.horizon - base - swing * waves(rng, c.x, length)
        crest = f32(colour) + 26
        c.cover(edge, tint(colours, (crest, colour), distance, snow), 9, c.horizon + 5)


def _mountains(c: Canvas, colours: Palette, rng: np.random.Generator, snow: Number) -> None:
    for distance, step, low, high in ((0.5, 21, (12, 18), (24, 33)), (0.16, 26, (5, 11), (24, 36))):
        coarse = ridge(rng, c.x, step, low, high)
        edge = c.horizon - coarse - 1.2 * waves(rng, c.x, 11, 2)
        rock = tint(colours, ((108, 112, 150), (124, 132, 146)), distance, 0.3 * snow)
        top, alpha = c.cover(edge, rock, 26, c.horizon + 5)
        below = c.y[top : top + len(alpha)] - edge
        rising = np.gradient(coarse) > 0
        at = np.arange(len(c.x)) - (0.42 * below * c.unit).astype(np.int64)
        lit = rising[np.clip(at, 0, len(c.x) - 1)]
        cap = 9 + 3.2 * waves(rng, c.x, 9, 2) - 0.42 * (c.horizon - edge - 26)
        white = np.clip((cap[None] - below) * 0.8 * c.unit, 0, 1)
        snowy = tint(colours, ((250, 252, 255), (190, 204, 236)), distance * 0.75)
        c.mix(alpha * ~lit * f32(0.3), tint(colours, (52, 58, 104), distance), top)
        c.mix(alpha * white * lit, snowy[0], top)
        c.mix(alpha * white * ~lit, snowy[1], top)
    edge = c.horizon - 3.5 - 2.5 * waves(rng, c.x, 60)
    c.cover(edge, tint(colours, ((122, 156, 104), (104, 140, 96)), 0.12, snow), 8, c.horizon + 5)


def _forest(c: Canvas, colours: Palette, rng: np.random.Generator, snow: Number) -> None:
    for distance, base, tall, step, colour in (
        (0.58, 13, 8, 3.4, (58, 120, 108)),
        (0.34, 6, 10, 4.2, (44, 112, 84)),
        (0.08, -2, 12, 5.2, (34, 98, 62)),
    ):
        rise = base + 3 * waves(rng, c.x, 90)
        edge = c.horizon - rise - ridge(rng, c.x, step, (0, 1.5), (0.6 * tall, tall))
        tip = f32(colour) + 30
        c.cover(edge, tint(colours, (tip, colour), distance, snow * 0.6), 9, c.horizon + 5)


def _desert(c: Canvas, colours: Palette, rng: np.random.Generator, snow: Number) -> None:
    table = np.clip(ridge(rng, c.x, 27, (-36, -14), (-12, 46)), 0, rng.uniform(13, 19))
    edge = c.horizon - 4 - table
    top, alpha = c.cover(
        edge, tint(colours, ((206, 120, 92), (222, 158, 122)), 0.3), 20, c.horizon + 5
    )
    band = 0.5 + 0.5 * np.sin(c.y[top : top + len(alpha)] * 1.3)
    c.mix(alpha * band.astype(np.float32) * 0.14, tint(colours, (140, 62, 60), 0.3), top)
    for distance, base, step, high in ((0.22, 1, 26, 11), (0.06, -4, 34, 10)):
        dune = ridge(rng, c.x, step, (0, 2), (0.6 * high, high))
        edge = c.horizon - base - dune
        top, alpha = c.cover(
            edge, tint(colours, ((252, 216, 146), (238, 192, 124)), distance), 10, c.horizon + 5
        )
        below = c.y[top : top + len(alpha)] - edge
        at = np.arange(len(c.x)) - (1.1 * below * c.unit).astype(np.int64)
        shaded = (np.gradient(dune) < 0)[np.clip(at, 0, len(c.x) - 1)]
        fade = np.clip(1 - below / 13, 0, 1)
        c.mix(alpha * shaded * fade * f32(0.5), tint(colours, (176, 112, 78), distance), top)


def _city(c: Canvas, colours: Palette, rng: np.random.Generator, snow: Number) -> None:
    for distance, tallest, wide, colour in (
        (0.56, 34, (6, 12), (108, 124, 160)),
        (0.16, 25, (8, 15), (98, 102, 128)),
    ):
        number = int(c.width / wide[0]) + 4
        steps, rise = branch(rng).random((number, 2)).T
        walls = np.cumsum(wide[0] + (wide[1] - wide[0]) * steps) - 10
        heights = (0.35 + 0.65 * rise) ** 1.3 * tallest
        at = np.clip(np.searchsorted(walls, c.x), 0, number - 1)
        edge = c.horizon - heights[at].astype(np.float32)
        wall = f32(colour)
        top, alpha = c.cover(
            edge, tint(colours, (wall, wall + 24), distance, 0.35 * snow), 26, c.horizon + 5
        )
        if distance > 0.5:
            continue
        below = c.y[top : top + len(alpha)] - edge
        alpha = alpha * np.clip((below - 1.5) * c.unit, 0, 1)
        across, down = c.x / 3.6, below / 4.4
        pane = np.clip(np.sin(2 * np.pi * across) * 1.6, 0, 1) * np.clip(
            np.sin(2 * np.pi * down) * 1.6, 0, 1
        )
        cell = (
            np.floor(across).astype(np.int64) * 7919
            + np.floor(down).astype(np.int64) * 104729
            + at * 31
        )
        lit = (cell * 2654435761 % 1000) < (480 if colours.dark else 240)
        lamp = f32(GLOW) if colours.dark else tint(colours, (196, 222, 240), 0.1)
        c.mix((alpha * pane * lit * (0.95 if colours.dark else 0.75)).astype(np.float32), lamp, top)


_PAINT = {
    "hills": _hills,
    "mountains": _mountains,
    "forest": _forest,
    "desert": _desert,
    "city": _city,
}
