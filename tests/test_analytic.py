"""Exact denoisers against Monte Carlo and each other."""

import jax.numpy as jnp
import numpy as np

from sdjax.diffusion.analytic import Empirical, Gaussian, GaussianMixture

SHAPE = (2, 2, 1, 1)


def test_one_component_is_a_gaussian():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE, np.float32))
    for sigma in (jnp.float32(0.7), jnp.asarray([0.1, 3.0]).reshape(2, 1, 1, 1)):
        one = GaussianMixture(jnp.ones(1), jnp.full((1, 1, 1, 1), 0.5), jnp.full(1, 2.0))
        np.testing.assert_allclose(one(x, sigma), Gaussian(0.5, 2.0)(x, sigma), rtol=1e-5)


def test_the_mixture_is_bayes_rule():
    weights, means, stds = np.array([0.3, 0.7]), np.array([-1.0, 2.0]), np.array([0.4, 0.8])
    rng = np.random.default_rng(1)
    k = rng.choice(2, 2_000_000, p=weights)
    x0 = means[k] + stds[k] * rng.standard_normal(k.size)
    x = x0 + 0.9 * rng.standard_normal(k.size)
    mixture = GaussianMixture(
        jnp.asarray(weights), jnp.asarray(means).reshape(2, 1, 1, 1), jnp.asarray(stds)
    )
    for at in (-1.5, 0.0, 0.8, 3.0):
        near = np.abs(x - at) < 0.02
        got = mixture(jnp.full((1, 1, 1, 1), at, jnp.float32), jnp.float32(0.9)).item()
        np.testing.assert_allclose(
            got, x0[near].mean(), atol=4 * x0[near].std() / near.sum() ** 0.5
        )


def test_the_flow_satisfies_its_equation():
    gaussian, x = Gaussian(0.3, 1.7), jnp.full((1, 1, 1, 1), 2.0)
    for sigma in (0.5, 3.0):
        s, step = jnp.float32(sigma), 1e-2
        slope = (gaussian.flow(x, s, s + step) - gaussian.flow(x, s, s - step)) / (2 * step)
        np.testing.assert_allclose(slope, (x - gaussian(x, s)) / s, rtol=2e-3)
    there = gaussian.flow(x, jnp.float32(5), jnp.float32(0))
    np.testing.assert_allclose(gaussian.flow(there, jnp.float32(0), jnp.float32(5)), x, rtol=1e-5)


def test_a_data_set_is_a_mixture_without_width():
    rng = np.random.default_rng(3)
    data = rng.standard_normal((5, 2, 2, 1)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((3, 2, 2, 1), np.float32))
    for sigma in (jnp.float32(0.6), jnp.asarray([0.2, 1.0, 30.0]).reshape(3, 1, 1, 1)):
        narrow = GaussianMixture(jnp.full(5, 0.2), jnp.asarray(data), jnp.zeros(5))
        got = Empirical(data)(x, sigma)
        np.testing.assert_allclose(got, narrow(x, sigma), rtol=1e-5, atol=1e-5)
    near = Empirical(data)(x, jnp.float32(1e-3))
    closest = np.argmin(((np.asarray(x)[:, None] - data) ** 2).sum((2, 3, 4)), axis=1)
    np.testing.assert_allclose(near, data[closest], rtol=1e-6)
