"""Guidance as Denoiser -> Denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from sdjax.diffusion import guidance

X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2, 1), np.float32))


def _conditioned(context, x, sigma):
    return x * context[:, None, None, None] + sigma


CONTEXT = jnp.asarray([1.0, 2.0, 3.0, 10.0, 20.0, 30.0])  # negatives first


@pytest.mark.parametrize("scale", [7.5, [1.0, 2.0, 0.0]])
@pytest.mark.parametrize("sigma", [0.5, [0.5, 1.0, 2.0]])
def test_cfg_extrapolates_from_negative_to_positive(scale, sigma):
    sigma = jnp.asarray(sigma)
    sigma = sigma.reshape(-1, 1, 1, 1) if sigma.ndim else sigma
    denoise = guidance.cfg(Partial(_conditioned, CONTEXT), jnp.asarray(scale))
    got = jax.jit(lambda f, x, s: f(x, s))(denoise, X, sigma)
    negative, positive = _conditioned(CONTEXT[:3], X, sigma), _conditioned(CONTEXT[3:], X, sigma)
    w = np.asarray(scale).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(got, negative + w * (positive - negative), rtol=2e-6, atol=1e-5)


def test_a_scale_per_image_may_already_be_shaped():
    a = guidance.cfg(Partial(_conditioned, CONTEXT), jnp.arange(3.0))(X, jnp.float32(1))
    b = guidance.cfg(Partial(_conditioned, CONTEXT), jnp.arange(3.0).reshape(3, 1, 1, 1))
    np.testing.assert_array_equal(a, b(X, jnp.float32(1)))


def test_new_scales_and_contexts_share_a_program():
    traces = []

    @jax.jit
    def run(denoise, x):
        traces.append(1)
        return denoise(x, jnp.float32(1))

    for i in range(3):
        run(guidance.cfg(Partial(_conditioned, CONTEXT + i), jnp.float32(i)), X)
    assert len(traces) == 1


def test_plain_functions_are_denoisers_too():
    clipped = guidance.clip(lambda x, sigma: x * 100, 1.0)
    assert jnp.abs(jax.jit(lambda f: f(X, jnp.float32(1)))(clipped)).max() == 1
