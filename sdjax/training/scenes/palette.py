"""The colours of air and light at every time and in every weather."""

from typing import NamedTuple

import numpy as np

from sdjax.training.scenes.canvas import f32
from sdjax.training.scenes.world import Scene

_AIR = {
    "dawn": ((112, 148, 214), (226, 178, 214), (255, 218, 198)),
    "day": ((54, 128, 216), (124, 188, 242), (216, 238, 252)),
    "sunset": ((64, 42, 112), (216, 80, 92), (255, 184, 88)),
    "night": ((8, 12, 42), (20, 34, 84), (56, 78, 138)),
}
_LAND = {
    "dawn": (0.94, 0.84, 0.92),
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.92, 0.7, 0.66),
    "night": (0.33, 0.42, 0.62),
}
_THINGS = {
    "dawn": (1.0, 0.95, 0.97),
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.98, 0.86, 0.8),
    "night": (0.78, 0.78, 0.88),
}
_DIMMED = {"clear": 1.0, "cloudy": 0.96, "rain": 0.8, "snow": 0.96, "fog": 0.95}
_CLOUD = {
    "dawn": ((255, 226, 226), (206, 168, 206)),
    "day": ((255, 255, 255), (192, 212, 234)),
    "sunset": ((255, 186, 148), (158, 76, 116)),
    "night": ((70, 84, 132), (36, 46, 92)),
}


class Palette(NamedTuple):
    """Colours are float32 [3], 0..255; lights are what remains of red, green and blue, 0..1."""

    air: np.ndarray
    """[3, 3]: the sky above, halfway and at the horizon."""
    haze: np.ndarray
    """What distance fades to."""
    fog: float
    """How much nearness fades too, 0..1."""
    land: np.ndarray
    """The light on the land."""
    things: np.ndarray
    """The light on objects, whose colours stay what their names say."""
    cloud: np.ndarray
    """[2, 3]: a cloud's lit and its shaded side."""
    dark: bool
    """Whether lamps are on."""


def palette(scene: Scene) -> Palette:
    """The palette of a scene's time and weather."""
    time, weather = scene.time, scene.weather
    air = f32(_AIR[time])
    cloud = f32(_CLOUD[time])
    grey = air.mean(-1, keepdims=True)
    if weather == "cloudy":
        air += 0.12 * (grey - air)
    elif weather == "rain":
        air += 0.62 * (grey * f32((0.72, 0.79, 0.88)) - air)
        cloud = cloud * 0.45 + 0.3 * cloud.mean(-1, keepdims=True) * f32((0.82, 0.9, 1.0))
    elif weather == "snow":
        air += 0.45 * (grey * 0.6 + air[2] * 0.4 + 8 - air)
        cloud += 0.25 * (cloud.mean(-1, keepdims=True) - cloud)
    elif weather == "fog":
        veil = air[2] * 0.6 + air.mean(0) * 0.4
        veil += 0.25 * (veil.mean() - veil)
        air += f32([[0.6], [0.75], [0.9]]) * (veil - air)
    dim = _DIMMED[weather]
    land = f32(_LAND[time]) * dim
    things = f32(_THINGS[time]) * (0.4 + 0.6 * dim)
    fog = 0.52 if weather == "fog" else 0.16 if weather in ("rain", "snow") else 0.0
    haze = air[2] if weather == "fog" else 0.75 * air[2] + 0.25 * air[1]
    return Palette(air, haze, fog, land, things, cloud, time == "night")
