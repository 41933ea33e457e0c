"""The world that small models are trained on: pictures, captions, and what is asked for."""

from dataclasses import replace

import numpy as np
import pytest

from sdjax.errors import InputError
from sdjax.training.scenes import (
    Asked,
    AskedGroup,
    Group,
    Scene,
    asked,
    caption,
    draw,
    scene,
    vocabulary,
)
from sdjax.training.scenes.asked import ATTRIBUTES
from sdjax.training.scenes.caption import LONGEST
from sdjax.training.scenes.labels import VIEWS, labels, spots
from sdjax.training.scenes.layout import layout
from sdjax.training.scenes.world import COLOURS, KINDS, PLACES

MANY = [scene(7, index) for index in range(900)]
PLAIN = Scene("day", "clear", "hills", "none", "none", (), 3)


def test_a_scene_is_a_function_of_seed_and_index():
    assert [scene(7, index) for index in (5, 3)] == [MANY[5], MANY[3]]
    assert not set(MANY) & {scene(8, index) for index in range(900)}
    assert len(set(MANY)) == len(MANY)


def test_the_same_scene_is_the_same_picture():
    once = [draw(drawn) for drawn in MANY[:6]]
    again = [draw(drawn) for drawn in reversed(MANY[:6])]
    for a, b in zip(once, reversed(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_value_of_every_attribute_occurs():
    for name, values in VIEWS.items():
        assert {getattr(s, name) for s in MANY} == set(values)
    groups = [group for s in MANY for group in s.groups]
    assert {group.kind for group in groups} == set(KINDS)
    assert {group.colour for group in groups} == set(COLOURS)
    assert {(group.count, group.place) for group in groups} == {
        (count, place) for count in (1, 2, 3) for place in PLACES
    }
    # Kinds x colours x counts x places of one group, times what the whole picture may be.
    assert len({replace(s, detail=0) for s in MANY}) > 0.95 * len(MANY)


def test_the_world_keeps_its_laws():
    for s in MANY:
        assert not (s.sky == "sun" and s.time == "night")
        assert s.sky not in ("moon", "aurora") or s.time == "night"
        assert not (s.weather == "snow" and s.terrain == "desert")
        for group in s.groups:
            assert group.kind != "boat" or s.water in ("sea", "lake")
        assert len({group.kind for group in s.groups}) == len(s.groups)


@pytest.mark.parametrize("size", [(128, 128), (128, 512), (96, 64), (160, 200)])
def test_pictures_have_any_size(size: tuple[int, int]):
    picture = draw(MANY[0], *size)
    assert picture.shape == (*size, 3) and picture.dtype == np.uint8
    with pytest.raises(InputError, match="make it larger"):
        draw(MANY[0], 128, 32)


def test_a_wider_picture_shows_more_of_the_same_land():
    for terrain in ("hills", "mountains", "forest", "desert", "city"):
        land = replace(PLAIN, terrain=terrain)
        wide = draw(land, 128, 512)
        near = np.abs(wide[:72, :120].astype(int) - draw(land)[:72, :120]).max()
        assert near <= 1
        assert len(np.unique(wide[60, 128:], axis=0)) > 8  # the land reaches the other end


def test_pictures_are_anti_aliased():
    # A picture drawn four times as large and averaged is what drawing it small should give.
    errors = []
    for s in MANY[:12]:
        large = draw(s, 512, 512).astype(np.float32)
        errors.append(np.abs(large.reshape(128, 4, 128, 4, 3).mean((1, 3)) - draw(s)).mean())
    assert np.mean(errors) < 3.2


def test_objects_stand_inside_the_picture_and_apart():
    for s in MANY[:600]:
        rng = np.random.Generator(np.random.Philox(s.detail))
        boxes = []
        for place in layout(s, 128, 128, rng):
            kind = KINDS[place.group.kind]
            width, height = kind.width * place.size, kind.height * place.size
            assert min(width, height) > 13 and max(width, height) > 20
            assert 0 <= place.x - width / 2 and place.x + width / 2 <= 128
            assert 0 <= place.y - height and place.y <= 124
            boxes.append((kind.band == "air", place.x - width / 2, place.x + width / 2))
        boxes.sort()
        for (air, _, right), (also, left, _) in zip(boxes, boxes[1:], strict=False):
            assert air != also or left > right - 1


def test_a_group_stands_where_its_place_says():
    for s in MANY[:600]:
        rng = np.random.Generator(np.random.Philox(s.detail))
        places = layout(s, 128, 128, rng)
        for group in s.groups:
            middle = np.mean([p.x for p in places if p.group == group]) / 128
            assert {"left": middle < 0.4, "middle": 0.42 < middle < 0.58, "right": middle > 0.6}[
                group.place
            ]


def test_captions_are_true_and_short_and_read_back():
    words = set(vocabulary())
    told = 0
    for n, s in enumerate(MANY):
        text = caption(s, n % 5)
        said = text.replace(",", " ,").split()
        assert len(said) <= LONGEST and set(said) <= words and text == text.lower()
        read = asked(text)
        assert read.holds(s), (text, s, read)
        told += sum(getattr(read, name) is not None for name in ATTRIBUTES)
        shown = {group.kind for group in s.groups}
        assert {group.kind for group in read.groups} <= shown
    assert told > 2.5 * len(MANY)


def test_captions_of_one_scene_differ_and_return():
    written = [caption(MANY[1], variation) for variation in range(20)]
    assert len(set(written)) > 15
    assert written == [caption(MANY[1], variation) for variation in range(20)]


@pytest.mark.parametrize(
    "prompt, wanted",
    [
        (
            "A red house by the sea at night",
            Asked(time="night", water="sea", groups=(AskedGroup("house", "red", 1),)),
        ),
        (
            "two yellow balloons above snowy mountains at sunset",
            Asked(time="sunset", terrain="mountains", groups=(AskedGroup("balloon", "yellow", 2),)),
        ),
        (
            "three blue cars on the left and an old tower on the right, heavy rain",
            Asked(
                weather="rain",
                groups=(
                    AskedGroup("car", "blue", 3, "left"),
                    AskedGroup("tower", None, 1, "right"),
                ),
            ),
        ),
        (
            "on the left a kite and on the right 2 pink tents",
            Asked(
                groups=(AskedGroup("kite", None, 1, "left"), AskedGroup("tent", "pink", 2, "right"))
            ),
        ),
        (
            "white sailboats, lake, misty morning",
            Asked("dawn", "fog", None, "lake", None, (AskedGroup("boat", "white"),)),
        ),
        ("a starry night", Asked(time="night", weather="clear")),
        ("city lights on a sunny day", Asked("day", "clear", "city", None, "sun")),
        ("the northern lights over a forest", Asked(terrain="forest", sky="aurora")),
        ("a corgi in a hat", Asked()),
    ],
)
def test_asked_reads_what_people_write(prompt: str, wanted: Asked):
    assert asked(prompt) == wanted


def test_asked_holds_only_in_scenes_that_have_all_of_it():
    s = replace(PLAIN, groups=(Group("tree", "green", 2, "left"),))
    assert asked("two green trees on the left by day").holds(s)
    for wrong in (
        "three green trees",
        "red trees",
        "a house",
        "trees on the right",
        "trees at night",
    ):
        assert not asked(wrong).holds(s)


def test_labels_are_the_scene():
    for s in MANY[:200]:
        found = labels(s)
        views = {name: values[found[i]] for i, (name, values) in enumerate(VIEWS.items())}
        assert views == {name: getattr(s, name) for name in VIEWS}
        things = found[len(VIEWS) :].reshape(-1, 3)
        counts = {group.kind: group.count for group in s.groups}
        assert [counts.get(kind, 0) for kind in KINDS] == list(things[:, 0])
        np.testing.assert_allclose(spots(s).sum((0, 1)), things[:, 0], atol=1e-5)
