"""Small pictures of the world's objects, drawn four times too large and averaged."""

from typing import Any

import numpy as np

from sdjax.training.scenes.world import KINDS, Number

OVER = 4
PIGMENTS = {
    "red": (218, 38, 40),
    "orange": (246, 132, 22),
    "yellow": (252, 220, 48),
    "green": (44, 168, 74),
    "blue": (38, 92, 224),
    "purple": (130, 56, 190),
    "pink": (255, 132, 190),
    "white": (250, 249, 246),
}
GLOW = (255, 214, 120)
"""The colour of lamps behind windows."""
PANE = (178, 214, 236)
Colour = tuple[Number, Number, Number]
Points = list[tuple[Number, Number]]


class Pen:
    """Draws in units on a transparent sheet; every colour is lit but those that shine."""

    def __init__(self, width: Number, height: Number, scale: Number, light: np.ndarray):
        from PIL import Image, ImageDraw

        self.scale = scale * OVER
        size = (
            -(-int(width * self.scale + 2) // OVER) * OVER,
            int(height * self.scale) // OVER * OVER + OVER,
        )
        self.sheet = Image.new("RGBA", size, (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.sheet)
        self.left = (size[0] - width * self.scale) / 2
        self.top = size[1] - height * self.scale
        self.light = light

    def ink(self, colour: Colour, shade: Number = 1.0, shines: bool = False) -> tuple[int, ...]:
        lit = np.asarray(colour) * (1.0 if shines else self.light)
        lit = lit * shade if shade <= 1 else lit + (255 - lit) * (shade - 1) * lit.max() / 255
        return (*(int(c) for c in np.clip(lit, 0, 255)), 255)

    def at(self, x: Number, y: Number) -> tuple[Number, Number]:
        return self.left + x * self.scale, self.top + y * self.scale

    def area(
        self, points: Points, colour: Colour, shade: Number = 1.0, shines: bool = False
    ) -> None:
        self.draw.polygon([self.at(*p) for p in points], fill=self.ink(colour, shade, shines))

    def box(self, x0: Number, y0: Number, x1: Number, y1: Number, *paint: Any) -> None:
        self.area([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], *paint)

    def oval(self, x: Number, y: Number, rx: Number, ry: Number, *paint: Any) -> None:
        corners = [*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)]
        self.draw.ellipse(corners, fill=self.ink(*paint))

    def line(self, points: Points, thick: Number, *paint: Any) -> None:
        width = max(1, round(thick * self.scale))
        self.draw.line(
            [self.at(*p) for p in points], fill=self.ink(*paint), width=width, joint="curve"
        )

    def done(self) -> np.ndarray:
        """The sheet at its final size: float32 [h, w, 4], colours 0..255 times alpha 0..1."""
        small = np.asarray(self.sheet.reduce(OVER), np.float32)
        alpha = small[..., 3:] / 255
        return np.concatenate([small[..., :3] * alpha, alpha], -1)


def sprite(kind: str, colour: str, scale: Number, light: np.ndarray, dark: bool) -> np.ndarray:
    """One object, float32 [h, w, 4], its alpha premultiplied; it stands on its last row.

    Args:
        kind: one of `world.KINDS`.
        colour: one of `world.COLOURS`.
        scale: pixels a unit.
        light: what the light leaves of red, green and blue, 0..1.
        dark: whether lamps are on.
    """
    width, height, _ = KINDS[kind]
    pen = Pen(width, height, scale, light)
    _DRAW[kind](pen, PIGMENTS[colour], dark)
    return pen.done()


def _window(pen: Pen, x0: Number, y0: Number, x1: Number, y1: Number, dark: bool) -> None:
    pen.box(x0, y0, x1, y1, GLOW if dark else PANE, 1.0, dark)


def _house(pen: Pen, colour: Colour, dark: bool) -> None:
    pen.box(20.5, 2, 24.5, 12, (150, 92, 78))
    pen.box(2.5, 11, 27.5, 29, colour)
    pen.box(19, 11, 27.5, 29, colour, 0.86)
    pen.box(2.5, 11, 27.5, 13, colour, 0.7)
    pen.area([(0, 12), (7, 2), (23, 2), (30, 12)], (108, 74, 70))
    pen.area([(0, 12), (7, 2), (11, 2), (6, 12)], (108, 74, 70), 1.2)
    pen.box(12.4, 19, 17.6, 29, (104, 66, 46))
    _window(pen, 5.4, 17, 10.2, 22.5, dark)
    _window(pen, 19.8, 17, 24.6, 22.5, dark)


def _tree(pen: Pen, colour: Colour, dark: bool) -> None:
    pen.area([(11, 22), (15, 22), (16.5, 36), (9.5, 36)], (116, 78, 54))
    for x, y, r in ((13, 11.5, 11.5), (6.6, 18, 6.6), (19.4, 18, 6.6), (13, 20, 7)):
        pen.oval(x, y, r, r, colour, 0.8)
    for x, y, r in ((12, 10.5, 10), (6.8, 16.5, 5.6), (18, 16, 5.6)):
        pen.oval(x, y, r, r, colour)
    pen.oval(9.5, 8, 5, 4.4, colour, 1.22)


def _tower(pen: Pen, colour: Colour, dark: bool) -> None:
    pen.area([(4.5, 10), (16.5, 10), (18, 44), (3, 44)], colour)
    pen.area([(12.5, 10), (16.5, 10), (18, 44), (13, 44)], colour, 0.82)
    pen.box(1.5, 6, 19.5, 12.5, colour)
    pen.box(13, 6, 19.5, 12.5, colour, 0.82)
    pen.box(3.5, 12.5, 17.5, 14, colour, 0.62)
    for x in (1.5, 8.2, 14.9):
        pen.box(x, 1.5, x + 4.6, 7, colour, 0.82 if x > 14 else 1.0)
    _window(pen, 8.6, 17.5, 12.4, 24, dark)
    pen.area(
        [(6.8, 44), (6.8, 36), (8.5, 33.4), (12.5, 33.4), (14.2, 36), (14.2, 44)], (84, 58, 48)
    )


def _tent(pen: Pen, colour: Colour, dark: bool) -> None:
    pen.area([(0, 22), (14, 1), (18, 1), (32, 22)], colour, 0.8)
    pen.area([(0, 22), (14, 1), (16, 1), (21, 22)], colour)
    pen.area([(8.2, 22), (14.6, 7.5), (18.4, 22)], GLOW if dark else (70, 52, 52), 1.0, dark)
    pen.line([(16, 2), (16, 0.4)], 1.0, (96, 74, 60))


def _car(pen: Pen, colour: Colour, dark: bool) -> None:
    pen.area([(8, 8.5), (12.5, 1), (24.5, 1), (29.5, 8.5)], colour)
    pen.area([(10.8, 8), (13.7, 2.8), (17.6, 2.8), (17.6, 8)], GLOW if dark else PANE, 1.0, dark)
    pen.area([(19.4, 8), (19.4, 2.8), (23.6, 2.8), (27, 8)], GLOW if dark else PANE, 1.0, dark)
    pen.area([(1.5, 9.5), (4, 7.6), (31, 7.6), (35, 10), (35.5, 15.5), (0.8, 15.5)], colour)
    pen.box(1, 12.8, 35.3, 15.5, colour, 0.78)
    for x in (9, 27.2):
        pen.oval(x, 14.8, 4.2, 4.2, (44, 42, 50))
        pen.oval(x, 14.8, 1.9, 1.9, (196, 198, 204))
    pen.oval(33.9, 11, 1.5, 1.4, (255, 244, 190), 1.0, dark)


def _boat(pen: Pen, colour: Colour, dark: bool) -> None:
    pen.line([(14, 0.5), (14, 26)], 1.2, (96, 66, 48))
    pen.area([(15.2, 1.5), (27.5, 22), (15.2, 22)], colour)
    pen.area([(12.8, 4), (12.8, 22), (3, 22)], colour, 0.84)
    pen.area([(1, 24), (29, 24), (25, 32), (6, 32)], (122, 78, 54))
    pen.area([(1, 24), (29, 24), (28, 26.4), (2, 26.4)], colour)
    if dark:
        pen.oval(24.5, 22.8, 1.3, 1.3, GLOW, 1.0, True)


def _balloon(pen: Pen, colour: Colour, dark: bool) -> None:
    pen.line([(7, 24), (11, 32)], 0.7, (110, 84, 66))
    pen.line([(19, 24), (15, 32)], 0.7, (110, 84, 66))
    skirt = [(1.1, 17.5), (24.9, 17.5), (16.6, 29), (9.4, 29)]
    pen.area(skirt, colour, 0.8)
    pen.oval(13, 13, 13, 13, colour, 0.8)
    pen.oval(12.2, 12.6, 10.6, 12.6, colour)
    pen.area([(2.4, 18.5), (21, 18.5), (14.5, 29), (9.4, 29)], colour)
    pen.oval(13, 13, 4.4, 13, colour, 0.86)
    pen.area([(8.7, 17), (17.3, 17), (14, 29), (12, 29)], colour, 0.86)
    pen.oval(7.8, 8.6, 3, 4.2, colour, 1.4)
    if dark:
        pen.oval(13, 27, 3.2, 2.6, GLOW, 1.0, True)
    pen.box(9.8, 31.6, 16.2, 37, (138, 92, 56))


def _kite(pen: Pen, colour: Colour, dark: bool) -> None:
    tail: Points = [(12.5, 27), (14.5, 30.5), (11, 34), (13, 37.5)]
    pen.line(tail, 0.9, (236, 232, 226))
    for x, y in ((14.2, 31), (11.3, 35)):
        pen.area([(x - 3, y - 1.6), (x + 3, y + 1.6), (x + 3, y - 1.6), (x - 3, y + 1.6)], colour)
    top, right, foot, left, heart = (12.5, 0), (25, 11), (12.5, 28), (0, 11), (12.5, 11)
    pen.area([top, right, heart], colour, 0.78)
    pen.area([top, left, heart], colour)
    pen.area([left, foot, heart], colour, 0.78)
    pen.area([right, foot, heart], colour)


_DRAW = {
    "house": _house,
    "tree": _tree,
    "tower": _tower,
    "tent": _tent,
    "car": _car,
    "boat": _boat,
    "balloon": _balloon,
    "kite": _kite,
}
