"""What everything is painted on and with: a float picture that knows its size in units."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from sdjax.training.scenes.world import Number

UNITS = 128
"""Units of a picture's shorter side; the world's sizes are given in them."""
_FINE = 2


def f32(values: Any) -> np.ndarray:
    """Numbers as a float32 array."""
    return np.asarray(values, np.float32)


class Canvas:
    """A picture in the making: float32 [h, w, 3], 0..255, the sky above `horizon`.

    `x` [w] and `y` [h, 1] are the pixels' centres in units; `unit` is the pixels in one.
    """

    def __init__(self, height: int, width: int):
        self.unit = min(height, width) / UNITS
        self.x = (np.arange(width, dtype=np.float32) + 0.5) / f32(self.unit)
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / f32(self.unit))[:, None]
        self.width, self.height = width / self.unit, height / self.unit
        self.horizon = 0.52 * self.height
        self.pixels = np.zeros((height, width, 3), np.float32)

    def row(self, y: Number) -> int:
        """The row of pixels at a height in units."""
        return int(np.clip(round(y * self.unit), 0, len(self.pixels)))

    def mix(self, alpha: np.ndarray, colour: np.ndarray, top: int = 0, left: int = 0) -> None:
        """Lay a colour ([3], or one a pixel) over the pixels from (top, left) by alpha [h, w]."""
        h, w = alpha.shape
        under = self.pixels[top : top + h, left : left + w]
        under += alpha[..., None] * (colour - under)

    def cover(
        self,
        edge: np.ndarray,
        colours: np.ndarray,
        depth: Number = 1.0,
        until: Number | None = None,
    ) -> tuple[int, np.ndarray]:
        """Fill what lies below an edge [w] (units), smoothly cut.

        `colours` [2, 3] are the colour at the edge and `depth` units below it. Gives the first row
        and the alpha, for what is to be painted on the same ground.
        """
        top = self.row(float(edge.min()) - 1)
        end = len(self.pixels) if until is None else self.row(until)
        below = self.y[top:end] - edge
        alpha = np.clip(below * self.unit + 0.5, 0, 1)
        fade = np.clip(below * (1 / depth), 0, 1)[..., None]
        self.mix(alpha, colours[0] + fade * (colours[1] - colours[0]), top)
        return top, alpha

    def marks(
        self, kind: str, shapes: Iterable[tuple[Number, ...]], until: Number, blur: Number = 0.0
    ) -> np.ndarray:
        """Draw small soft shapes on the rows down to `until`: their coverage, float32 [h, w].

        A "dot" is (x, y, radius, strength), a "line" (x0, y0, x1, y1, thickness, strength).
        `blur` is in units.
        """
        from PIL import Image, ImageDraw, ImageFilter

        scale = self.unit * _FINE
        rows = self.row(until)
        sheet = Image.new("L", (len(self.x) * _FINE, rows * _FINE))
        draw = ImageDraw.Draw(sheet)
        for *at, size, strength in shapes:
            fill = int(255 * strength)
            if kind == "dot":
                x, y = at
                box = [
                    (x - size) * scale,
                    (y - size) * scale,
                    (x + size) * scale,
                    (y + size) * scale,
                ]
                draw.ellipse(box, fill=fill)
            else:
                draw.line([a * scale for a in at], fill=fill, width=max(1, round(size * scale)))
        small = sheet.reduce(_FINE)
        if blur:
            small = small.filter(ImageFilter.BoxBlur(blur * self.unit))
        return np.asarray(small, np.float32) / 255


def branch(rng: np.random.Generator) -> np.random.Generator:
    """A generator of its own, for what may take any number of draws."""
    return np.random.Generator(np.random.Philox(int(rng.integers(2**62))))


def waves(rng: np.random.Generator, x: np.ndarray, length: Number, number: int = 3) -> np.ndarray:
    """A smooth random curve over x, about -1..1, whose longest wave takes `length` units."""
    total = np.zeros_like(x)
    for n in range(number):
        turns = 2 * np.pi * (1 + 0.7 * n + 0.3 * rng.random()) / length
        total += np.sin(x * f32(turns) + f32(rng.uniform(0, 2 * np.pi))) / (n + 1)
    return total / 1.5


def ridge(
    rng: np.random.Generator,
    x: np.ndarray,
    step: Number,
    low: tuple[Number, Number],
    high: tuple[Number, Number],
) -> np.ndarray:
    """A zigzag over x, up to heights in `high` and down to `low`, each about `step` units long."""
    knots = int(x[-1] / (0.8 * step)) + 6
    own = branch(rng)  # a wider picture takes more numbers, and must not change what comes after
    steps, rise = own.random((knots, 2)).T
    at = np.cumsum((0.8 + 0.5 * steps) * step) - 3 * step
    low_high = np.asarray([low, high])[np.arange(knots) % 2]
    heights = low_high[:, 0] + rise * (low_high[:, 1] - low_high[:, 0])
    return np.interp(x, at, heights).astype(np.float32)
