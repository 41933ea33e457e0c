"""Likelihood against densities in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import QUICK

from sdjax.diffusion import noise, spacings
from sdjax.diffusion.analytic import Gaussian, GaussianMixture
from sdjax.diffusion.likelihood import bits_per_dimension, log_likelihood
from sdjax.errors import InputError

LOW, HIGH = 0.02, 80.0
SIGMAS = spacings.exponential(40, LOW, HIGH)[:-1].astype(np.float32)
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2, 2), np.float32))
quick = functools.partial(jax.jit, compiler_options=QUICK)
MIXTURE = GaussianMixture(
    jnp.asarray([0.3, 0.7]), jnp.asarray([-1.0, 0.8]).reshape(2, 1, 1, 1), jnp.asarray([0.5, 0.9])
)


def bits(log_prob):
    return np.asarray(log_prob) / (X[0].size * np.log(2))


def normal(x, mean, variance):
    """log N(x; mean, variance), each image as a whole, in float64."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    return -0.5 * ((x - mean) ** 2 / variance + np.log(2 * np.pi * variance)).sum(1)


@pytest.mark.parametrize("keys", [None, noise.keys([1, 2, 3])])
@pytest.mark.parametrize(("mean", "std"), [(0.3, 1.2), (-0.5, 0.2)])
def test_a_gaussian_has_its_density_to_a_thousandth_of_a_bit(keys, mean, std):
    """Exactly, and by Hutchinson, whose estimate is exact where the Jacobian is a multiple of 1."""
    x = mean + std * X
    prior = {"data_mean": mean, "data_std": std}
    got = quick(lambda x: log_likelihood(Gaussian(mean, std), x, SIGMAS, keys, **prior))(x)
    want = normal(x, mean, std**2 + LOW**2)
    np.testing.assert_allclose(bits(got.log_prob), bits(want), atol=1e-3)
    there = Gaussian(mean, std).flow(x, jnp.float32(LOW), jnp.float32(HIGH))
    np.testing.assert_allclose(got.noise, there, atol=2e-4 * HIGH)


def test_a_mixture_has_its_density():
    """Without its moments, from levels so high that they do not matter; falling and rising ones."""
    x = X * 0.7 + 0.3
    rows = [
        np.log(w) + normal(x, m, s**2 + LOW**2) for w, m, s in ((0.3, -1, 0.5), (0.7, 0.8, 0.9))
    ]
    want = np.logaddexp(*rows)
    high = spacings.exponential(60, LOW, 3000.0)[:-1].astype(np.float32)
    for sigmas in (high, high[::-1].copy()):
        got = quick(functools.partial(log_likelihood, MIXTURE, sigmas=sigmas))(x)
        np.testing.assert_allclose(bits(got.log_prob), bits(want), atol=1e-3)


def test_hutchinsons_estimate_is_right_on_average():
    """256 images alike, each with its own signs: within four standard errors of the exact one."""
    x = jnp.broadcast_to(X[:1], (256, 2, 2, 2))
    sigmas = SIGMAS[::4].copy()
    exact = quick(lambda x: log_likelihood(MIXTURE, x, sigmas))(x[:1]).log_prob[0]
    some = quick(lambda x, k: log_likelihood(MIXTURE, x, sigmas, k, 2))(x, noise.keys(range(256)))
    spread = np.std(some.log_prob)
    assert spread > 1e-3
    assert abs(np.mean(some.log_prob) - exact) < 4 * spread / 16 + 1e-4


def test_the_method_is_of_fourth_order():
    data = Gaussian(0.5, 1.0)
    with jax.enable_x64(True):
        x = jnp.asarray(np.asarray(X), jnp.float64)
        errors = []
        for n in (8, 16):
            sigmas = spacings.exponential(n + 1, 0.1, 40.0)[:-1]
            got = quick(lambda x, s: log_likelihood(data, x, s[::-1]))(x, jnp.asarray(sigmas))
            there = data.flow(x, jnp.asarray(sigmas[-1]), jnp.asarray(sigmas[0]))
            errors.append(np.abs(got.noise - there).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.4)


def test_bits_count_the_bins():
    """A uniform density over 256 bins is 8 bits."""
    log_prob = jnp.full(2, -12 * np.log(2.0))  # 12 values of -1 .. 1
    width = 2 / 256
    np.testing.assert_allclose(bits_per_dimension(log_prob, 12, width), 8, rtol=1e-6)
    np.testing.assert_allclose(bits_per_dimension(log_prob, 12), 1, rtol=1e-6)


def test_bad_levels_and_keys_are_refused():
    for sigmas in (np.array([1.0, 0.0]), np.array([1.0]), np.array([1.0, 1.0]), np.ones((3, 2))):
        with pytest.raises(InputError, match="sigmas"):
            log_likelihood(Gaussian(0.0, 1.0), X, sigmas)
    with pytest.raises(InputError, match="one an image"):
        log_likelihood(Gaussian(0.0, 1.0), X, SIGMAS, noise.keys([1]))
    with pytest.raises(InputError, match="probes"):
        log_likelihood(Gaussian(0.0, 1.0), X, SIGMAS, noise.keys([1, 2, 3]), 0)
