"""`caption(scene, variation)`: a scene in words, never twice quite the same."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sdjax.training.scenes import words
from sdjax.training.scenes.world import COLOURS, KINDS, Group, Scene

LONGEST = 28
"""Words and commas in a caption, at most."""


class _Pen:
    """Makes the choices of one caption."""

    def __init__(self, rng: np.random.Generator, frank: float):
        self.rng = rng
        self.frank = frank

    def one(self, options: Sequence[str]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def says(self, chance: float) -> bool:
        """Whether an attribute is told; the less frank, the less often."""
        return bool(self.rng.random() < chance * self.frank)


def caption(scene: Scene, variation: int = 0) -> str:
    """Describe a scene in lower-case English, at most `LONGEST` words and commas.

    Everything said is true of the scene; what is left unsaid is free. `variation` picks the words.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((scene.detail, variation))))
    frank = 1.0
    while True:
        text = _write(scene, _Pen(rng, frank))
        if 0 < len(text.replace(",", " ,").split()) <= LONGEST:
            return text
        frank *= 0.9


def _write(scene: Scene, pen: _Pen) -> str:
    groups = [group for n, group in enumerate(scene.groups) if n == 0 or pen.rng.random() < 0.92]
    if len(groups) == 2 and pen.rng.random() < 0.5:
        groups.reverse()
    style = pen.rng.random()
    if groups and style < 0.08:
        return _tags(scene, groups, pen)
    if not groups or style < 0.26:
        return _landscape(scene, groups, pen)
    objects = _objects(groups, pen, leads=style > 0.48)
    where, when = _where(scene, groups, pen), _when(scene, pen)
    if when and style < 0.4:
        return f"{when[0]}, {' '.join([objects, *where, *when[1:]])}"
    if style < 0.48:
        objects = f"{pen.one(words.OPENINGS)} {objects}"
    return " ".join([objects, *where, *when])


def _noun(group: Group, pen: _Pen) -> str:
    """A red house, two kites: the count and colour are seldom left out."""
    noun = words.NOUNS[group.kind][int(pen.rng.integers(len(words.NOUNS[group.kind])))][
        group.count > 1
    ]
    number = pen.one(words.NUMBERS[group.count])
    if group.count > 1 and pen.rng.random() < 0.04:
        number = ""
    colour = group.colour if pen.rng.random() < 0.92 else ""
    if number == "a" and colour == "orange":
        number = "an"
    return " ".join(word for word in (number, colour, noun) if word)


def _placed(group: Group, pen: _Pen, chance: float) -> str:
    noun = _noun(group, pen)
    return f"{noun} {pen.one(words.PLACES[group.place])}" if pen.says(chance) else noun


def _objects(groups: list[Group], pen: _Pen, leads: bool = False) -> str:
    if len(groups) == 1:
        if leads and pen.says(0.08):
            return f"{pen.one(words.PLACES[groups[0].place])} {_noun(groups[0], pen)}"
        return _placed(groups[0], pen, 0.42)
    airy = [KINDS[group.kind].band == "air" for group in groups]
    if airy[0] and not airy[1] and pen.rng.random() < 0.5:
        joint = pen.one(("above", "over", "high above"))
        return f"{_noun(groups[0], pen)} {joint} {_placed(groups[1], pen, 0.35)}"
    chance = 0.65 if airy[0] == airy[1] else 0.35
    joint = pen.one(("and", "and", "and", "with"))
    return f"{_placed(groups[0], pen, chance)} {joint} {_placed(groups[1], pen, chance)}"


def _where(scene: Scene, groups: list[Group], pen: _Pen) -> list[str]:
    bands = {KINDS[group.kind].band for group in groups}
    parts = []
    if scene.water != "none" and pen.says(0.8):
        water = words.WATERS[scene.water]
        parts.append(pen.one(water["on" if bands == {"water"} else "at"]))
    if pen.says(0.78):
        terrain = words.TERRAINS[scene.terrain]
        parts.append(pen.one(terrain["under" if bands == {"air"} else "at"]))
    if len(parts) == 2 and pen.rng.random() < 0.4:
        parts.reverse()
    return parts


def _when(scene: Scene, pen: _Pen) -> list[str]:
    time, weather = pen.says(0.82), pen.says(0.3 if scene.weather == "clear" else 0.82)
    parts = []
    if time and weather and pen.rng.random() < 0.45:
        adjective = pen.one(words.WEATHER_ADJECTIVES[scene.weather])
        noun = pen.one(words.TIME_NOUNS[scene.time])
        parts.append(f"{'at' if noun in ('dawn', 'sunset') else 'on'} a {adjective} {noun}")
    else:
        if scene.time == "night" and scene.weather == "clear" and pen.rng.random() < 0.2:
            parts.append(pen.one(words.STARS))
        elif time:
            parts.append(pen.one(words.TIMES[scene.time]))
        if weather:
            parts.append(pen.one(words.WEATHERS[scene.weather]))
    if scene.sky != "none" and pen.says(0.82):
        parts.append(pen.one(words.SKIES[scene.sky]))
    return parts


def _landscape(scene: Scene, groups: list[Group], pen: _Pen) -> str:
    """The land first, then what stands in it."""
    parts = [pen.one(words.TERRAINS[scene.terrain]["is"])]
    if scene.water != "none" and pen.says(0.85):
        joint = pen.one(("and", "with", "by"))
        parts.append(f"{joint} {pen.one(words.WATERS[scene.water]['is'])}")
    parts += _when(scene, pen)
    if groups:
        joint = pen.one(("with", ", with", ","))
        parts.append(f"{joint} {_objects(groups, pen)}")
    return " ".join(parts).replace(" ,", ",")


def _tags(scene: Scene, groups: list[Group], pen: _Pen) -> str:
    """As people write for machines: words between commas."""
    parts = [_noun(group, pen) for group in groups]
    told: list[Any] = [
        scene.water if scene.water != "none" else "",
        scene.terrain,
        scene.time,
        "clear sky"
        if scene.weather == "clear"
        else "clouds"
        if scene.weather == "cloudy"
        else scene.weather,
        words.TAGS.get(scene.sky, ""),
    ]
    parts += [tag for tag in told if tag and pen.rng.random() < 0.75]
    return ", ".join(parts)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, and the comma, sorted."""
    glue = "a an and with by at on above over high clear sky clouds , rain snow fog"
    tags = [*words.TERRAINS, *words.WATERS, *words.TIMES, *words.TAGS.values(), *COLOURS]
    phrases = [glue, *tags, *_strings(_TABLES)]
    return sorted({word for phrase in phrases for word in phrase.split()})


_TABLES = (
    words.NOUNS,
    words.NUMBERS,
    words.PLACES,
    words.TERRAINS,
    words.WATERS,
    words.TIMES,
    words.TIME_NOUNS,
    words.WEATHERS,
    words.WEATHER_ADJECTIVES,
    words.STARS,
    words.SKIES,
    words.OPENINGS,
)


def _strings(table: Any) -> Iterator[str]:
    """The strings at the leaves of nested dicts and tuples."""
    if isinstance(table, str):
        yield table
    else:
        for part in table.values() if isinstance(table, dict) else table:
            yield from _strings(part)
