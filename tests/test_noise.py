"""Noise is a function of an image's seed, step and draw, bit for bit.

That devices do not change it is test_parallel's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import noise
from sdjax.errors import InputError

SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1, 123456789]
SIGMA = jnp.float32(1)


def test_every_bit_of_a_seed_counts():
    for seed in (0, 1, 2**31, 2**32 - 1):
        assert (
            jax.random.key_data(noise.key(seed)) == jax.random.key_data(jax.random.key(seed))
        ).all()
    words = np.asarray(jax.random.key_data(noise.keys(SEEDS)))
    assert len({tuple(w) for w in words}) == len(SEEDS)
    assert [int(hi) * 2**32 + int(lo) for hi, lo in words] == SEEDS
    same = np.asarray(jax.random.key_data(noise.keys(np.array(SEEDS, np.uint64))))
    np.testing.assert_array_equal(same, words)
    assert noise.keys([]).shape == (0,)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, "1", None, np.float32(1), np.bool_(True)])
def test_what_is_not_a_seed_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        noise.keys([seed])


@pytest.mark.parametrize("shape", [(64, 64, 4), (8, 24, 4)])
def test_an_image_has_its_noise_in_any_company(shape):
    """Alone, in batches of 2 to 9, in any order, jitted and not, inside a scan: the same bits."""
    keys = noise.keys(SEEDS)
    step = jnp.int32(3)

    def both(keys, step):
        white = noise.White(keys, shape)
        return noise.start(keys, shape), white(step, SIGMA, SIGMA), white(step, SIGMA, SIGMA, 1)

    jitted = jax.jit(both)
    alone = [np.stack(jitted(keys[i : i + 1], step), 1)[0] for i in range(9)]
    assert len({a.tobytes() for a in alone}) == 9
    order = np.random.default_rng(0).permutation(9)
    for size in (2, 5, 9) if shape[0] < 64 else (3, 9):
        pick = order[:size]
        for run in (jitted, both) if size == 5 else (jitted,):
            for i, row in zip(pick, np.stack(run(keys[pick], step), 1), strict=True):
                np.testing.assert_array_equal(row, alone[i])

    _, scanned = jax.lax.scan(lambda c, i: (c, both(keys, i)), 0, jnp.arange(5))
    for i in range(9):
        np.testing.assert_array_equal(np.stack([s[3, i] for s in scanned]), alone[i])


def test_images_may_stand_at_different_steps():
    keys = noise.keys([5, 6, 7])
    white = noise.White(keys, (4, 4, 2))
    mixed = white(jnp.asarray([2, 0, 9]).reshape(3, 1, 1, 1), SIGMA, SIGMA)
    for i, step in enumerate((2, 0, 9)):
        np.testing.assert_array_equal(mixed[i], white(jnp.int32(step), SIGMA, SIGMA)[i])


def test_steps_draws_and_the_start_differ_and_sigma_does_not_matter():
    keys = noise.keys([1])
    white = noise.White(keys, (4, 4, 2))
    arrays = [white(jnp.int32(i), SIGMA, SIGMA, d) for i in (0, 1) for d in (0, 1)]
    arrays.append(noise.start(keys, (4, 4, 2)))
    assert len({np.asarray(a).tobytes() for a in arrays}) == 5
    np.testing.assert_array_equal(arrays[0], white(jnp.int32(0), SIGMA * 2, SIGMA * 3))


def test_noise_is_normal():
    x = np.asarray(noise.start(noise.keys(range(64)), (32, 32, 4))).ravel()
    n = x.size
    assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_a_tape_repeats_its_recording():
    draws = jnp.arange(3 * 2 * 2 * 1 * 1 * 1.0).reshape(3, 2, 2, 1, 1, 1)
    tape = noise.Tape(draws)
    np.testing.assert_array_equal(tape(jnp.int32(2), SIGMA, SIGMA, 1), draws[2, 1])
    mixed = tape(jnp.asarray([2, 0]).reshape(2, 1, 1, 1), SIGMA, SIGMA)
    np.testing.assert_array_equal(mixed, jnp.stack([draws[2, 0, 0], draws[0, 0, 1]]))
    short = noise.Tape(draws[:, 0])
    np.testing.assert_array_equal(short(jnp.int32(1), SIGMA, SIGMA), draws[1, 0])
    assert (tape.image_axis, short.image_axis) == (2, 1)
    with pytest.raises(InputError, match="2 times"):
        short(jnp.int32(1), SIGMA, SIGMA, 1)
