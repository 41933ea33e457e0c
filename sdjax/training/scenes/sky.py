"""The upper half: graded air, sun, moon, stars, rainbow, aurora and clouds."""

import numpy as np

from sdjax.training.scenes.canvas import Canvas, branch, f32, waves
from sdjax.training.scenes.palette import Palette
from sdjax.training.scenes.world import KINDS, Number, Scene

_RAINBOW = f32(
    [(150, 90, 210), (70, 120, 240), (70, 200, 120), (250, 230, 90), (250, 150, 60), (235, 70, 70)]
)
_LOW_SUN = {"hills": 0.33, "mountains": 0.17, "forest": 0.26, "desert": 0.33, "city": 0.2}


def paint_sky(c: Canvas, scene: Scene, colours: Palette, rng: np.random.Generator) -> Number | None:
    """Paint the sky; gives where the sun or moon stands (x in units), if either does."""
    t = c.y / c.horizon
    air = [np.interp(t[:, 0], (0.0, 0.55, 1.0), colours.air[:, n]) for n in range(3)]
    c.pixels[:] = np.stack(air, -1).astype(np.float32)[:, None]
    disc = scene.sky in ("sun", "moon")
    rng = branch(rng)
    x, y = _stand(c, scene, rng)
    if scene.time == "night" and scene.weather in ("clear", "cloudy"):
        _stars(c, branch(rng), 0.95 if scene.weather == "clear" else 0.3, (x, y) if disc else None)
    if scene.sky == "aurora":
        _aurora(c, rng)
    elif scene.sky == "rainbow":
        _rainbow(c, rng)
    elif scene.sky == "sun":
        _sun(c, scene, x, y)
    elif scene.sky == "moon":
        _moon(c, x, y, rng)
    if scene.weather == "cloudy":
        _clouds(c, colours, rng, (x, y) if disc else None)
    elif scene.weather in ("rain", "snow"):
        _overcast(c, colours, rng)
    return x if disc else None


def _stand(c: Canvas, scene: Scene, rng: np.random.Generator) -> tuple[Number, Number]:
    """A free place for the sun or moon, away from what flies."""
    taken = {group.place for group in scene.groups if KINDS[group.kind].band == "air"}
    free = {"left": (0.8, 0.72), "right": (0.2, 0.28), "middle": (0.11, 0.89)}
    if len(taken) == 1:
        at = free[taken.pop()][int(rng.integers(2))]
    else:
        at = rng.uniform(0.18, 0.82)
    y = rng.uniform(0.13, 0.2)
    if scene.time in ("dawn", "sunset"):
        y = _LOW_SUN[scene.terrain] + rng.uniform(-0.02, 0.02)
    if scene.weather == "snow":
        y = 0.27
    return float(at) * c.width, float(y) * c.height


def _glow(c: Canvas, x: Number, y: Number, reach: Number, colour: np.ndarray, most: Number) -> None:
    end = c.row(c.horizon + 2)
    far = np.sqrt((c.x - x) ** 2 + (c.y[:end] - y) ** 2)
    c.mix(f32(most) * np.exp(far * f32(-1 / reach)), colour)


def _disc(c: Canvas, x: Number, y: Number, radius: Number) -> tuple[np.ndarray, int, int]:
    """The coverage of a disc, with the first row and column of its box."""
    top, left = max(0, c.row(y - radius - 2)), max(0, int((x - radius - 2) * c.unit))
    end, right = c.row(y + radius + 2), int((x + radius + 2) * c.unit)
    far = np.sqrt((c.x[left:right] - x) ** 2 + (c.y[top:end] - y) ** 2)
    return np.clip((radius - far) * c.unit + 0.5, 0, 1), top, left


def _sun(c: Canvas, scene: Scene, x: Number, y: Number) -> None:
    low = scene.time != "day"
    warm = f32({"dawn": (255, 206, 170), "sunset": (255, 150, 70)}.get(scene.time, (255, 248, 214)))
    _glow(c, x, y, 26, warm, 0.75)
    radius = 10.0 if low else 8.5
    core = f32(
        {"dawn": (255, 240, 206), "sunset": (255, 226, 120)}.get(scene.time, (255, 244, 150))
    )
    alpha, top, left = _disc(c, x, y, radius)
    c.mix(alpha, core, top, left)


def _moon(c: Canvas, x: Number, y: Number, rng: np.random.Generator) -> None:
    _glow(c, x, y, 15, f32((150, 172, 226)), 0.55)
    alpha, top, left = _disc(c, x, y, 8.5)
    size = alpha.shape
    if rng.random() < 0.5:  # a crescent is the disc less another
        bite, _, _ = _disc_like(c, x + 4.5, y - 2.5, 7.6, top, left, size)
        alpha = alpha * (1 - bite)
    c.mix(alpha, f32((246, 242, 222)), top, left)
    for dx, dy, r in ((-3, -1.5, 1.9), (-1, 3.5, 1.5)):
        spot, _, _ = _disc_like(c, x + dx, y + dy, r, top, left, size)
        c.mix(spot * alpha * 0.5, f32((206, 204, 200)), top, left)


def _disc_like(
    c: Canvas, x: Number, y: Number, radius: Number, top: int, left: int, size: tuple[int, ...]
) -> tuple[np.ndarray, int, int]:
    far = (c.x[left : left + size[1]] - x) ** 2 + (c.y[top : top + size[0]] - y) ** 2
    return np.clip((radius - np.sqrt(far)) * c.unit + 0.5, 0, 1), top, left


def _stars(
    c: Canvas, rng: np.random.Generator, most: Number, disc: tuple[Number, Number] | None
) -> None:
    number = int(28 * c.width / 128)
    x, y = rng.uniform(0, c.width, number), rng.random(number) ** 1.3 * 0.42 * c.height
    size, shine = rng.uniform(0.7, 1.15, number), rng.uniform(0.35, 1, number) * most
    if disc is not None:
        shine = np.where((x - disc[0]) ** 2 + (y - disc[1]) ** 2 < 196, 0, shine)
    shapes = zip(x, y, size, shine, strict=True)
    c.mix(c.marks("dot", shapes, c.horizon, 0.4), f32((240, 240, 255)))


def _aurora(c: Canvas, rng: np.random.Generator) -> None:
    rows = c.row(c.horizon)
    y = c.y[:rows]
    for n, colour in enumerate(((60, 235, 150), (150, 90, 230))):
        foot = (0.32 - 0.08 * n) * c.height + 9 * waves(rng, c.x, 120, 2)
        rise = (foot - y) / f32(15 + 6 * n)
        ray = 0.72 + 0.28 * waves(rng, c.x, 26, 2)
        alpha = np.where(rise > 0, np.exp(-np.maximum(rise, 0)), np.exp(np.minimum(rise, 0) * 5))
        c.mix((alpha * ray * f32(0.8 - 0.2 * n)).astype(np.float32), f32(colour))


def _rainbow(c: Canvas, rng: np.random.Generator) -> None:
    rows = c.row(c.horizon + 2)
    x, radius = c.width * rng.uniform(0.42, 0.58), rng.uniform(50, 56)
    far = np.sqrt((c.x - x) ** 2 + (c.y[:rows] - c.horizon - 8) ** 2)
    t = (far - f32(radius)) / 9
    alpha = np.clip(np.minimum(t, 1 - t) * 5 + 0.3, 0, 1) * f32(0.72)
    at = np.clip(t, 0, 1) * 5
    colour = np.stack([np.interp(at, np.arange(6), _RAINBOW[:, n]) for n in range(3)], -1)
    c.mix(alpha, colour.astype(np.float32))


def _puffs(
    rng: np.random.Generator, x: Number, y: Number, size: Number
) -> list[tuple[Number, ...]]:
    """One cloud: round heads on a flat foot, as dots."""
    heads = [(-0.95, 0.02, 0.36), (-0.42, -0.2, 0.52), (0.18, -0.32, 0.6), (0.72, -0.06, 0.44)]
    return [
        (
            x + size * (dx + rng.uniform(-0.1, 0.1)),
            y + size * dy * 0.8,
            size * r * rng.uniform(0.85, 1.1),
            1.0,
        )
        for dx, dy, r in heads
    ]


def _shade(
    c: Canvas,
    shapes: list[tuple[Number, ...]],
    colours: np.ndarray,
    most: Number,
    blur: Number = 0.8,
) -> None:
    """Paint clouds: the shaded colour, and the lit one on all but the lower edges."""
    alpha = c.marks("dot", shapes, c.horizon, blur)
    down = max(1, round(3.2 * c.unit))
    lit = np.zeros_like(alpha)
    lit[:-down] = np.minimum(alpha[:-down], alpha[down:])
    lit[1:] = 0.5 * (lit[1:] + lit[:-1])
    c.mix(alpha * most, colours[1])
    c.mix(lit * most, colours[0])


def _clouds(
    c: Canvas, colours: Palette, rng: np.random.Generator, disc: tuple[Number, Number] | None
) -> None:
    number = max(4, round(5 * c.width / 128))
    shapes: list[tuple[Number, ...]] = []
    for n in range(number):
        x = c.width * (n + rng.uniform(0.2, 0.8)) / number
        y, size = c.height * rng.uniform(0.07, 0.36), rng.uniform(10, 15)
        if disc is not None and abs(x - disc[0]) < size + 10 and abs(y - disc[1]) < 18:
            y = disc[1] + 20 if disc[1] < 0.2 * c.height else disc[1] - 20
        foot = y + 0.25 * size
        shapes += [(x, min(y, foot), r, s) for x, y, r, s in _puffs(rng, x, y, size)]
    _shade(c, shapes, colours.cloud, 0.94)


def _overcast(c: Canvas, colours: Palette, rng: np.random.Generator) -> None:
    number = round(7 * c.width / 128)
    for low, most in ((9, 0.55), (1, 0.9)):
        shapes: list[tuple[Number, ...]] = []
        for n in range(number):
            x = c.width * (n + rng.uniform(-0.1, 1.1)) / number
            shapes.append((x, rng.uniform(-9, 3) + low, rng.uniform(9, 18), 1.0))
        _shade(c, shapes, colours.cloud, most, 3)
