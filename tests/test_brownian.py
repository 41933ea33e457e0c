"""A Brownian path an image: the same under refinement, in any company, of the right statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import QUICK

from sdjax.diffusion import noise, sampling, spacings
from sdjax.diffusion.analytic import Gaussian
from sdjax.diffusion.brownian import BrownianTree
from sdjax.diffusion.projection import Momentum
from sdjax.diffusion.samplers import (
    SEEDS2,
    DPMSolverPP2MSDE,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    Euler,
    EulerAncestral,
)
from sdjax.types import leaves32

SHAPE = (4, 4, 3)
KEYS = noise.keys(range(3))
STEP = jnp.int32(0)


quick = functools.partial(jax.jit, compiler_options=QUICK)


@quick
def _draw(tree, a, b):
    return tree(STEP, a, b)


def draw(tree, a, b):
    """With levels of each image's own, in one program."""
    each = (tree.keys.shape[0], 1, 1, 1)
    return _draw(leaves32(tree), *(np.broadcast_to(np.float32(level), each) for level in (a, b)))


def increment(a, b, tree=None):
    """Of the path from level a to b: the noise, without its scaling."""
    tree = BrownianTree(KEYS, SHAPE) if tree is None else tree
    return np.asarray(draw(tree, a, b)) * abs(b - a) ** 0.5


@pytest.mark.parametrize("levels", [(14.6, 6.0, 0.03), (2.0, 0.5, 1.3), (10.0, 9.99, 9.98)])
def test_increments_add_up(levels):
    a, b, c = levels
    parts = increment(a, b) + increment(b, c)
    np.testing.assert_allclose(parts, increment(a, c), atol=2e-5)
    np.testing.assert_array_equal(increment(a, b), -increment(b, a))


def test_a_draw_depends_on_nothing_but_key_and_levels():
    tree = BrownianTree(KEYS, SHAPE)
    want = np.asarray(draw(tree, 5.0, 3.0))
    shared = quick(lambda tree, a, b: tree(jnp.int32(7), a, b, 1))  # one level for all
    again = shared(leaves32(tree), jnp.float32(5), jnp.float32(3))
    np.testing.assert_allclose(again, want, rtol=1e-6, atol=1e-6)
    for i in range(3):
        alone = draw(BrownianTree(KEYS[i : i + 1], SHAPE), 5.0, 3.0)
        np.testing.assert_allclose(alone[0], want[i], rtol=1e-6, atol=1e-6)
    levels = np.array([5.0, 2.0, 0.7]).reshape(3, 1, 1, 1)
    mixed = draw(tree, levels, levels / 2)
    np.testing.assert_array_equal(mixed[1], draw(tree, 2.0, 1.0)[1])
    np.testing.assert_array_equal(mixed[2], draw(tree, 0.7, 0.35)[2])
    assert (np.abs(want[0] - want[1]) > 0).all()


def test_increments_are_independent_and_normal():
    """Over disjoint intervals, of lengths from 1e-3 to 10: unit variance, no correlation."""
    tree = BrownianTree(noise.keys([11]), (100, 100, 1))
    levels = [14.6, 4.6, 2.0, 1.0, 0.9, 0.1, 0.03, 0.029]
    draws = [np.asarray(draw(tree, a, b)).ravel() for a, b in zip(levels, levels[1:], strict=False)]
    n = draws[0].size
    correlation = np.cov(draws)
    off = correlation - np.eye(len(draws))
    assert np.abs(np.diag(off)).max() < 4 * (2 / n) ** 0.5
    assert np.abs(off - np.diag(np.diag(off))).max() < 4 / n**0.5
    assert np.abs(np.mean(draws, 1)).max() < 4 / n**0.5
    assert np.abs(np.mean(np.power(draws, 4), 1) - 3).max() < 4 * (96 / n) ** 0.5


def test_levels_that_a_path_does_not_have_are_loud():
    assert np.isnan(draw(BrownianTree(KEYS, SHAPE, sigma_max=8.0), 9.0, 3.0)).all()
    assert (np.asarray(draw(BrownianTree(KEYS, SHAPE), 3.0, 3.0)) == 0).all()


def test_finer_steps_approach_one_picture():
    """Where fresh noise would give another picture for every step count."""
    data = Gaussian(0.5, 1.0)
    x = 10 * noise.start(KEYS, SHAPE)
    sampler = leaves32(DPMSolverPP2MSDE())

    @quick
    def ends(noises, sigmas):
        return sampling.sample(sampler, data, x, sigmas, noises)

    def gaps(noises):
        rows = [np.geomspace(10, 0.2, n + 1) for n in (10, 20, 80)]
        runs = [ends(noises, spacings.pad([row] * 3, 81).astype(np.float32)) for row in rows]
        return [float(jnp.sqrt(jnp.mean((run - runs[-1]) ** 2))) for run in runs[:-1]]

    coarse, fine = gaps(KEYS)
    assert fine < 0.6 * coarse < 0.3 * min(gaps(noise.White(KEYS, SHAPE)))


def test_gradients_take_noise_for_a_constant():
    tree = BrownianTree(KEYS, SHAPE)

    def loss(sigma):
        return jnp.sum(tree(STEP, sigma, jnp.float32(1)) * sigma)

    value, slope = quick(jax.value_and_grad(loss))(jnp.float32(3))
    np.testing.assert_allclose(slope, value / 3, rtol=1e-5)


@pytest.mark.parametrize("kind", [DPMSolverPPSDE, DPMSolverPP2MSDE, DPMSolverPP3MSDE])
def test_from_keys_alone_k_diffusions_sde_solvers_end_in_the_gaussian(kind):
    """Also both stages of one that evaluates inside a step: 4,096 chains, 64 an image, within 3
    standard errors.
    """
    chains, keys, shape = 4096, noise.keys(range(64)), (8, 8, 1)
    sigmas = spacings.karras(30, 0.02, 40.0).astype(np.float32)
    x = 0.7 + jnp.sqrt(1.3**2 + 40.0**2) * noise.start(keys, shape)
    whole = jax.jit(lambda *args: sampling.sample(*args, sigmas, keys), compiler_options=QUICK)
    x = np.asarray(whole(leaves32(kind()), Gaussian(0.7, 1.3), x))
    assert abs(x.mean() - 0.7) < 3 * 1.3 / chains**0.5
    assert abs(x.var() / 1.3**2 - 1) < 3 * (2 / chains) ** 0.5


def test_samplers_say_whose_noise_it_is():
    """One path also inside what wraps a sampler; in white noise the others'."""
    paths = (DPMSolverPPSDE(), DPMSolverPP2MSDE(), DPMSolverPP3MSDE(), Momentum(DPMSolverPPSDE()))
    for sampler in paths:
        assert isinstance(sampling.noise_of(sampler, KEYS, SHAPE), BrownianTree)
    for sampler in (EulerAncestral(), SEEDS2(), Momentum(Euler())):
        assert isinstance(sampling.noise_of(sampler, KEYS, SHAPE), noise.White)
