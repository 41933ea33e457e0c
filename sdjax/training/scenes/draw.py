"""`draw(scene)`: a scene as pixels."""

import numpy as np
from jaxtyping import UInt8

from sdjax.errors import InputError
from sdjax.training.scenes.canvas import Canvas, branch, f32, waves
from sdjax.training.scenes.land import GROUND, SHORE, paint_backdrop, tint
from sdjax.training.scenes.layout import Place, layout
from sdjax.training.scenes.palette import Palette, palette
from sdjax.training.scenes.sky import paint_sky
from sdjax.training.scenes.sprites import sprite
from sdjax.training.scenes.world import KINDS, Number, Scene

_FLOWERS = {
    "hills": (255, 244, 170),
    "mountains": (244, 240, 250),
    "forest": (226, 196, 240),
    "desert": (170, 112, 76),
}
_SEA = f32((36, 104, 160))


def draw(scene: Scene, height: int = 128, width: int = 128) -> UInt8[np.ndarray, "h w 3"]:
    """Draw a scene; a wider picture shows more of the same land.

    Raises:
        InputError: when a side is shorter than 64 pixels.
    """
    if min(height, width) < 64:
        raise InputError(f"a scene needs 64 pixels a side, got {height}x{width}: make it larger")
    rng = np.random.Generator(np.random.Philox(scene.detail))
    c = Canvas(height, width)
    colours = palette(scene)
    places = layout(scene, c.width, c.height, rng)
    disc = paint_sky(c, scene, colours, rng)
    paint_backdrop(c, scene, colours, rng)
    _paint_ground(c, scene, colours, places, disc, rng)
    if scene.weather in ("fog", "rain", "snow"):
        _veil(c, scene, colours, rng)
    for place in places:
        _paint_object(c, scene, colours, place, disc)
    if scene.weather == "rain":
        _rain(c, colours, rng)
    elif scene.weather == "snow":
        _snow(c, rng)
    return np.clip(c.pixels + 0.5, 0, 255).astype(np.uint8)


def _paint_ground(
    c: Canvas,
    scene: Scene,
    colours: Palette,
    places: list[Place],
    disc: Number | None,
    rng: np.random.Generator,
) -> None:
    snow = 0.92 if scene.weather == "snow" else 0.0
    far, near = GROUND[scene.terrain]
    water = _water(c, colours, disc, rng)
    start = c.horizon - 1.5 + 1.2 * waves(rng, c.x, 70)
    ground = tint(colours, (far, near), 0.06, snow)
    if scene.water != "sea":
        c.cover(start, ground, 0.3 * c.height)
        _folds(c, scene, colours, rng, (0.63, 0.76, 0.89))
    top = c.row(c.horizon - 3)
    y = c.y[top:]
    if scene.water == "sea":
        edge = 0.745 * c.height + 2.2 * waves(rng, c.x, 90)
        c.mix(np.clip((y - c.horizon) * c.unit + 0.5, 0, 1) * np.ones_like(c.x), water, top)
        c.cover(edge - 1.6, tint(colours, ((255, 255, 255), (255, 255, 255)), 0.05))
        c.cover(edge, tint(colours, SHORE, 0.03, snow), 6)
        start = edge + 5.5 + 1.4 * waves(rng, c.x, 50)
        c.cover(start, ground[::-1], 24)
        _folds(c, scene, colours, rng, (0.82, 0.91))
    elif scene.water == "lake":
        _mix_water(c, _lake(c, y, places, rng), water, colours, snow, top)
    elif scene.water == "river":
        _mix_water(c, _river(c, y, places, rng), water, colours, snow, top)


def _folds(
    c: Canvas, scene: Scene, colours: Palette, rng: np.random.Generator, heights: tuple[Number, ...]
) -> None:
    """Lay soft rises over the ground, lit at their crests, with flowers or stones between them."""
    snow = 0.9 if scene.weather == "snow" else 0.0
    far, near = f32(GROUND[scene.terrain])
    for n, height in enumerate(heights):
        edge = height * c.height + (2.2 + 0.8 * n) * waves(rng, c.x, rng.uniform(70, 150))
        shift = f32(0.35 + 0.25 * n)
        body = far + shift * (near - far)
        lit = tint(colours, (body + 0.5 * (far - body) + 14, body - 12), 0.02, snow)
        c.cover(edge, lit, 15)
    if snow or scene.terrain == "city":
        return
    number = int(11 * c.width / 128)
    rng = branch(rng)
    x, y = rng.uniform(0, c.width, number), rng.uniform(0.68, 0.99, number) * c.height
    size = 0.5 + 0.9 * (y / c.height - 0.6) / 0.4
    dots = c.marks("dot", zip(x, y, size, np.full(number, 0.6), strict=True), c.height)
    c.mix(dots, tint(colours, _FLOWERS[scene.terrain], 0.0))


def _water(
    c: Canvas, colours: Palette, disc: Number | None, rng: np.random.Generator
) -> np.ndarray:
    """What water shows from just above the horizon down: the world above, upside down, rippled."""
    top = c.row(c.horizon - 3)
    y = c.y[top:]
    deep = (y - c.horizon) / (c.height - c.horizon)
    rows = np.clip((c.horizon - (y - c.horizon) * 1.5) * c.unit, 0, len(c.pixels) - 1).astype(
        np.int64
    )
    sway = (1.6 * np.sin(y * 1.9 + rng.uniform(0, 6)) * c.unit).astype(np.int64)
    columns = np.clip(np.arange(len(c.x)) + sway, 0, len(c.x) - 1)
    image = c.pixels[rows, columns]
    blue = _SEA * colours.land
    image = image + np.clip(0.22 + 0.3 * deep, 0, 0.6)[..., None] * (blue - image)
    ripple = np.sin(y * 2.3 + 1.5 * np.sin(c.x * 0.11 + y * 0.5 + rng.uniform(0, 6)))
    image += (5 * ripple)[..., None]
    if disc is not None:
        path = np.exp(-(((c.x - disc) / (5 + 0.22 * (y - c.horizon))) ** 2))
        shine = path * (0.55 + 0.4 * ripple)
        light = f32((255, 236, 190)) if not colours.dark else f32((220, 226, 246))
        image += (0.75 * shine)[..., None] * (light - image)
    return image.astype(np.float32)


def _mix_water(
    c: Canvas, inside: np.ndarray, water: np.ndarray, colours: Palette, snow: Number, top: int
) -> None:
    """Lay water where `inside` (units from its edge, [h, w]) is positive, with a bank around it."""
    bank = np.clip((inside + 1.8) * c.unit * 0.7, 0, 1) * f32(0.8)
    c.mix(bank.astype(np.float32), tint(colours, SHORE[0], 0.05, snow * 0.7), top)
    c.mix(np.clip(inside * c.unit + 0.5, 0, 1).astype(np.float32), water, top)


def _lake(c: Canvas, y: np.ndarray, places: list[Place], rng: np.random.Generator) -> np.ndarray:
    boats = [p.x for p in places if p.group.kind == "boat"]
    middle = sum(boats) / len(boats) if boats else c.width * (0.5 + rng.uniform(-0.06, 0.06))
    rx, ry = 50 + rng.uniform(-2, 5), 0.088 * c.height
    wobble = 1 + 0.07 * waves(rng, c.x, 50, 2)
    across = ((c.x - middle) / rx) ** 2
    down = (y - 0.655 * c.height) / (ry * wobble)
    return (1 - np.sqrt(across + down**2)) * ry


def _river(c: Canvas, y: np.ndarray, places: list[Place], rng: np.random.Generator) -> np.ndarray:
    taken = {p.group.place for p in places if KINDS[p.group.kind].band == "ground"}
    free = [x for name, x in (("left", 0.2), ("middle", 0.5), ("right", 0.8)) if name not in taken]
    foot = c.width / 2 + (float(rng.choice(free or [0.5])) - 0.5) * min(c.width, 150)
    t = np.clip((y - c.horizon) / (c.height - c.horizon), 0, 1)
    bend = rng.choice([-1.0, 1.0]) * 16 * np.sin(t**0.7 * 2 * np.pi) * (0.35 + 0.65 * t)
    source = c.width / 2 + (foot - c.width / 2) * 0.3
    centre = source + (foot - source) * t + bend
    half = 1.6 + 14 * t**1.25
    return np.where(y > c.horizon, half - np.abs(c.x - centre), -9)


def _veil(c: Canvas, scene: Scene, colours: Palette, rng: np.random.Generator) -> None:
    """Fade the middle distance into the air."""
    most = {"fog": 0.46, "rain": 0.16, "snow": 0.12}[scene.weather]
    away = (c.y - c.horizon - 4) / c.height
    away /= np.where(away < 0, 0.1, 0.26)
    alpha = most * np.exp(-(away**2)) + (0.12 if scene.weather == "fog" else 0.0)
    drift = 0.86 + 0.14 * waves(rng, c.x + 1.5 * c.y[:, :1], 90, 2)
    c.mix((alpha * drift).astype(np.float32), colours.haze)
    if scene.weather != "fog":
        return
    banks = max(4, round(4 * c.width / 128))
    rng = branch(rng)
    for n in range(banks):
        x, y = c.width * (n + rng.uniform(0, 1)) / banks, c.height * rng.uniform(0.4, 0.62)
        wide = rng.uniform(34, 52)
        _spot(c, x, y, wide, rng.uniform(6, 9), colours.haze + (34 if colours.dark else 22), 0.62)


def _paint_object(
    c: Canvas, scene: Scene, colours: Palette, place: Place, disc: Number | None
) -> None:
    kind = place.group.kind
    light = colours.things
    image = sprite(kind, place.group.colour, place.size * c.unit, light, colours.dark)
    if place.mirrored:
        image = image[:, ::-1]
    if colours.fog > 0.5:
        image[..., :3] += f32(0.2) * (image[..., 3:] * colours.haze - image[..., :3])
    band = KINDS[kind].band
    foot = c.row(place.y)
    left = round(place.x * c.unit - image.shape[1] / 2)
    if band == "ground":
        _shadow(c, place, disc, 0.16 if scene.weather in ("fog", "rain") or colours.dark else 0.3)
    elif band == "water":
        below = image[::-1][: round(9 * c.unit)]
        below = below * np.linspace(0.5, 0, len(below), dtype=np.float32)[:, None, None]
        _paste(c, below, foot - 1, left)
    if colours.dark and kind in ("house", "tower", "tent", "car"):
        _lamplight(c, place)
    _paste(c, image, foot - len(image), left)


def _paste(c: Canvas, image: np.ndarray, top: int, left: int) -> None:
    h, w = c.pixels.shape[:2]
    image = image[max(0, -top) : h - top, max(0, -left) : w - left]
    top, left = max(0, top), max(0, left)
    under = c.pixels[top : top + image.shape[0], left : left + image.shape[1]]
    under *= 1 - image[..., 3:]
    under += image[..., :3]


def _shadow(c: Canvas, place: Place, disc: Number | None, most: Number) -> None:
    lean = 0.0 if disc is None else float(np.clip((place.x - disc) / 20, -4, 4))
    half = KINDS[place.group.kind].width * place.size * 0.56
    _spot(c, place.x + lean, place.y, half, 2.6 * place.size, f32((18, 22, 44)), most)


def _lamplight(c: Canvas, place: Place) -> None:
    kind = KINDS[place.group.kind]
    y = place.y - 0.35 * kind.height * place.size
    _spot(c, place.x, y, kind.width * place.size, 0.8 * kind.height, f32((255, 196, 110)), 0.3)


def _spot(
    c: Canvas, x: Number, y: Number, rx: Number, ry: Number, colour: np.ndarray, most: Number
) -> None:
    """Lay a soft oval of a colour over the picture."""
    top, end = c.row(y - ry), c.row(y + ry)
    left, right = max(0, int((x - rx) * c.unit)), max(0, int((x + rx) * c.unit))
    far = ((c.x[left:right] - x) / rx) ** 2 + ((c.y[top:end] - y) / ry) ** 2
    c.mix((f32(most) * np.clip(1 - far, 0, 1)).astype(np.float32), colour, top, left)


def _rain(c: Canvas, colours: Palette, rng: np.random.Generator) -> None:
    number = int(38 * c.width * c.height / 128**2)
    x, y = rng.uniform(-5, c.width + 5, number), rng.uniform(-5, c.height, number)
    long, faint = rng.uniform(7, 12, number), rng.uniform(0.3, 0.6, number)
    lines = [
        (a, b, a - 0.28 * n, b + n, 0.9, s) for a, b, n, s in zip(x, y, long, faint, strict=True)
    ]
    alpha = c.marks("line", lines, c.height)
    c.mix(alpha, f32((190, 206, 232)) if colours.dark else f32((236, 242, 250)))


def _snow(c: Canvas, rng: np.random.Generator) -> None:
    number = int(40 * c.width * c.height / 128**2)
    x, y = rng.uniform(0, c.width, number), rng.uniform(0, c.height, number)
    size, shine = rng.uniform(1.1, 1.9, number), rng.uniform(0.6, 0.9, number)
    flakes = c.marks("dot", zip(x, y, size, shine, strict=True), c.height, 0.5)
    c.mix(flakes, f32((255, 255, 255)))
