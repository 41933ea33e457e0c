"""`asked(prompt)`: which of a scene's attributes a prompt asks for."""

import re
from dataclasses import dataclass

from sdjax.training.scenes.words import MEANINGS
from sdjax.training.scenes.world import COLOURS, Scene

ATTRIBUTES = ("time", "weather", "terrain", "water", "sky")
"""What a prompt can ask of the whole picture."""


@dataclass(frozen=True)
class AskedGroup:
    """Objects of one kind; None is free, and a plural without a number is two or more."""

    kind: str
    colour: str | None = None
    count: int | None = None
    place: str | None = None


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for; None is free, and so are objects that it does not name."""

    time: str | None = None
    weather: str | None = None
    terrain: str | None = None
    water: str | None = None
    sky: str | None = None
    groups: tuple[AskedGroup, ...] = ()

    def holds(self, scene: Scene) -> bool:
        """Whether a scene is as asked."""
        for name in ATTRIBUTES:
            if getattr(self, name) not in (None, getattr(scene, name)):
                return False
        shown = {group.kind: group for group in scene.groups}
        return all(
            group.kind in shown
            and group.colour in (None, shown[group.kind].colour)
            and group.count in (None, shown[group.kind].count)
            and group.place in (None, shown[group.kind].place)
            for group in self.groups
        )


_ONE = {
    "house": "house cottage home hut",
    "tree": "tree",
    "tower": "tower castle",
    "tent": "tent",
    "car": "car",
    "boat": "boat sailboat ship",
    "balloon": "balloon",
    "kite": "kite",
}
_KINDS = {word: (kind, 1) for kind, said in _ONE.items() for word in said.split()}
_KINDS |= {word + "s": (kind, 2) for word, (kind, _) in list(_KINDS.items())}
_NUMBERS = {"a": 1, "an": 1, "one": 1, "single": 1, "1": 1}
_NUMBERS |= {"two": 2, "2": 2, "pair": 2, "couple": 2, "three": 3, "3": 3}
_BETWEEN = {"of", "the", "hot", "air", "sailing", "castle", "little", "small", "big", "large"}
_BETWEEN |= {"pretty", "tiny", "bright", "old", "tall", "lonely", "some"}
_PLACES = {
    "left": "left",
    "right": "right",
    "middle": "middle",
    "centre": "middle",
    "center": "middle",
}
_PEAKS = {"mountain", "mountains", "peaks", "capped", "topped"}


def asked(prompt: str) -> Asked:
    """Read a prompt for what the world has a name for; all other words are ignored.

    Every `caption` of a scene is read back exactly. Where a prompt says two things of one
    attribute, the first counts.
    """
    said = re.findall(r"[a-z0-9]+", prompt.lower())
    found: dict[str, str] = {}
    nouns = []
    for n, word in enumerate(said):
        following = said[n + 1] if n + 1 < len(said) else ""
        if word in ("snow", "snowy") and following in _PEAKS:
            continue
        if word == "castle" and following in _KINDS:
            continue
        if word in _KINDS:
            nouns.append(n)
        if word == "northern" and following == "lights":
            found.setdefault("sky", "aurora")
        for attribute, value in MEANINGS.get(word, ()):
            found.setdefault(attribute, value)
    places = {n: _PLACES[word] for n, word in enumerate(said) if word in _PLACES}
    leads = bool(places) and bool(nouns) and min(places) < nouns[0]
    groups = []
    for i, n in enumerate(nouns):
        start = nouns[i - 1] + 1 if i else 0
        end = nouns[i + 1] if i + 1 < len(nouns) else len(said)
        near = range(start, n) if leads else range(n + 1, end)
        place = next((places[at] for at in near if at in places), None)
        groups.append(_group(said, n, start, place))
    return Asked(**found, groups=tuple(groups))


def _group(said: list[str], noun: int, start: int, place: str | None) -> AskedGroup:
    """The words just before a noun, back to the first that is neither a colour nor a number."""
    kind, number = _KINDS[said[noun]]
    colour: str | None = None
    count = 1 if number == 1 else None
    for at in range(noun - 1, start - 1, -1):
        word = said[at]
        if word in COLOURS and colour is None:
            colour = word
        elif word in _NUMBERS:
            if number > 1 or _NUMBERS[word] == 1:
                count = _NUMBERS[word] if not (number > 1 and _NUMBERS[word] == 1) else count
        elif word not in _BETWEEN:
            break
    return AskedGroup(kind, colour, count, place)
