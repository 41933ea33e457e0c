"""The measure of how well a picture follows its prompt, against the world's own truth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.errors import InputError
from sdjax.training.scenes import Asked, AskedGroup, Group, asked, caption, draw, scene
from sdjax.training.scenes.labels import seen
from sdjax.training.scenes.measure import (
    WEIGHTS,
    Score,
    Seen,
    compare,
    measure,
    save,
    score,
    weights,
)
from sdjax.training.scenes.reading import Reading

HELD_OUT = [scene(990_017, index) for index in range(160)]
SEEN = Seen("night", "clear", "hills", "sea", "moon", (Group("house", "red", 2, "left"),))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.stack([draw(held) for held in HELD_OUT])


def test_the_measure_reads_held_out_renders(pictures: np.ndarray):
    found = score([caption(held) for held in HELD_OUT], pictures)
    right, total = sum(found.right.values()), sum(found.asked.values())
    assert total > 900 and right / total > 0.995
    assert found.share > 0.97


def test_a_picture_is_read_alike_alone_and_in_any_batch(pictures: np.ndarray):
    together = measure(pictures[:60])
    assert measure(pictures[53:54]) == together[53:54]
    assert measure(pictures[:0]) == []


def test_the_measure_tells_other_prompts_from_the_right_ones(pictures: np.ndarray):
    others = [caption(held) for held in HELD_OUT[1:] + HELD_OUT[:1]]
    assert score(others, pictures).share < 0.1


def test_the_measure_reads_larger_pictures_too():
    large = np.stack([draw(held, 256, 256) for held in HELD_OUT[:20]])
    assert score([caption(held) for held in HELD_OUT[:20]], large).share > 0.9
    with pytest.raises(InputError, match="cut a square out"):
        measure(np.zeros((1, 128, 512, 3), np.uint8))
    with pytest.raises(InputError, match="each image needs its prompt"):
        score(["a house"], np.zeros((2, 128, 128, 3), np.uint8))


def test_only_what_is_asked_counts():
    assert compare(Asked(), SEEN) == []
    assert compare(asked("two red houses on the left by the sea at night"), SEEN) == [
        ("time", True),
        ("water", True),
        ("object", True),
        ("count", True),
        ("colour", True),
        ("place", True),
    ]
    wanted = Asked(sky="sun", groups=(AskedGroup("house", "blue", 3), AskedGroup("kite", "red")))
    assert compare(wanted, SEEN) == [
        ("sky", False),
        ("object", True),
        ("count", False),
        ("colour", False),
        ("object", False),
        ("colour", False),
    ]


def test_a_score_counts_images_with_everything_right():
    found = Score({"time": 1}, {"time": 2, "sky": 0}, (True, False))
    assert found.share == 0.5
    assert str(found).splitlines()[0].split() == ["time", "50.00", "%", "of", "2"]
    assert "sky" not in str(found)


def test_the_weights_are_small_and_come_back(tmp_path):
    assert WEIGHTS.stat().st_size < 600_000
    save(weights(), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == WEIGHTS.read_bytes()


def test_reading_learns_the_mean_over_images():
    stage = Reading()
    params, extra = stage.init(jax.random.key(0))
    rows = [seen(3, index) for index in range(4)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    keys = jax.random.split(jax.random.key(1), 4)
    step = jnp.int32(0)
    gradients = jax.jit(stage.gradients)
    whole = gradients(params, extra, {}, batch, keys, step)
    order = np.array([2, 0, 3, 1])
    mixed = {name: array[order] for name, array in batch.items()}
    again = gradients(params, extra, {}, mixed, keys[order], step)
    np.testing.assert_allclose(whole.metrics["loss"], again.metrics["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole.grads), jax.tree.leaves(again.grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max() + 1e-7)
    # The gradient is the loss's: a small step along it takes off what it promises.
    loss = whole.metrics["loss"]
    slope = sum(jnp.vdot(g, g) for g in jax.tree.leaves(whole.grads))
    less = jax.tree.map(lambda p, g: p - 0.01 * loss / slope * g, params, whole.grads)
    later = gradients(less, extra, {}, batch, keys, step).metrics["loss"]
    np.testing.assert_allclose(loss - later, 0.01 * loss, rtol=0.2)
