"""Trajectories against runs cut short, and costs against what the papers say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import QUICK

from sdjax.diffusion import noise, sampling, spacings
from sdjax.diffusion.analytic import Gaussian
from sdjax.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, EulerAncestral, Heun
from sdjax.diffusion.trajectories import draws, evaluations, may_draw, trajectory
from sdjax.errors import InputError
from sdjax.types import leaves32, pytree

DATA = Gaussian(0.5, 1.0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 2, 1), np.float32)) * 10
SIGMAS = spacings.karras(7, 0.1, 10.0).astype(np.float32)
KEYS = noise.keys([3, 4])
quick = functools.partial(jax.jit, compiler_options=QUICK)


@pytest.mark.parametrize("sampler", [Heun(), EulerAncestral()])
@pytest.mark.parametrize("every", [1, 3])
def test_a_trajectory_is_the_run_seen_at_every_kth_step(sampler, every):
    """7 steps seen at every third: before steps 0, 3, 6, and at the end."""
    path = quick(trajectory, static_argnames="every")(
        leaves32(sampler), DATA, X, SIGMAS, KEYS, every=every
    )
    carry = sampling.begin(leaves32(sampler), X)
    for i in range(7):
        j, k = divmod(i, every)
        if k == 0:
            np.testing.assert_allclose(path.x[j], carry.x, rtol=1e-5, atol=1e-5)
            want = DATA(carry.x, jnp.float32(SIGMAS[i]))
            np.testing.assert_allclose(path.x0[j], want, rtol=1e-5, atol=1e-5)
            assert path.sigma[j] == SIGMAS[i]
        carry = _one(leaves32(sampler), carry, i)
    np.testing.assert_allclose(path.x[-1], carry.x, rtol=1e-5, atol=1e-5)
    assert path.sigma[-1] == 0 and len(path.x) == len(path.x0) + 1 == -(-7 // every) + 1


@quick
def _one(sampler, carry, i):
    return sampling.scan(sampler, DATA, carry, SIGMAS, KEYS, i, 1)


def test_a_finished_image_repeats_its_end():
    rows = [spacings.karras(n, 0.1, 10.0) for n in (2, 4)]
    path = quick(trajectory)(leaves32(Euler()), DATA, X, spacings.pad(rows).astype("f"))
    assert path.sigma.shape == (5, 2, 1, 1, 1)
    np.testing.assert_array_equal(path.x[2:, 0], np.repeat(path.x[2:3, 0], 3, axis=0))
    np.testing.assert_array_equal(path.x0[2:, 0], np.repeat(path.x0[1:2, 0], 2, axis=0))


@pytree
class Shy:
    """A sampler that asks only inside a cond."""

    def init(self, x):
        return ()

    def step(self, denoise, x, at, state, noise):
        return jax.lax.cond(at.index == 0, lambda x: denoise(x, at.sigma), lambda x: x, x), state


def test_a_sampler_that_asks_only_under_a_cond_is_asked_for_its_estimates():
    path = quick(trajectory)(Shy(), DATA, X, SIGMAS)
    np.testing.assert_allclose(path.x[-1], DATA(X, jnp.float32(SIGMAS[0])), rtol=1e-5)
    for x, x0, sigma in zip(path.x, path.x0, path.sigma, strict=False):
        np.testing.assert_allclose(x0, DATA(x, sigma), rtol=1e-5)


def test_evaluations_are_counted_for_each_image():
    rows = spacings.pad([spacings.karras(3, 0.1, 9.0), spacings.karras(5, 0.1, 9.0)[:-1]])
    np.testing.assert_array_equal(evaluations(Euler(), rows), [3, 4])
    np.testing.assert_array_equal(evaluations(Heun(), rows), [5, 8])
    assert evaluations(DPMSolverPP2M(), SIGMAS) == 7


@pytree
class Careful:
    """As many evaluations as the image asks for."""

    def init(self, x):
        return ()

    def step(self, denoise, x, at, state, noise):
        return jax.lax.while_loop(lambda x: jnp.any(x > 1), lambda x: denoise(x, at.sigma), x), ()


def test_evaluations_of_a_sampler_that_looks_at_its_image():
    start = jnp.asarray([1.5, 9.0]).reshape(2, 1, 1, 1)
    got = evaluations(Careful(), spacings.pad([SIGMAS[-2:]] * 2), lambda x, s: x / 2, start)
    np.testing.assert_array_equal(got, [1, 4])


@pytree
class Stirred:
    """Says nothing of its noise, which it draws within a cond."""

    def init(self, x):
        return ()

    def step(self, denoise, x, at, state, noise):
        draw = lambda x: x + noise(at.sigma, at.sigma_next)  # noqa: E731
        return jax.lax.cond(jnp.any(at.left > 1), draw, lambda x: denoise(x, at.sigma), x), ()


def test_who_does_not_say_whether_it_draws_is_asked_for_a_step():
    assert may_draw(Stirred()) and draws(Stirred(), (2, 2, 1)) == 1
    assert not may_draw(Careful()) and draws(Careful(), (2, 2, 1)) == 0


def test_draws_are_counted_from_a_trace():
    wanted = [(Euler(), 0), (Euler(s_churn=1.0), 1), (DDIM(), 0), (DDIM(eta=1.0), 1), (DDPM(), 1)]
    for sampler, times in wanted:
        assert draws(sampler, (2, 2, 1)) == times


def test_what_cannot_be_seen_is_refused():
    for every in (0, True):
        with pytest.raises(InputError, match="every"):
            trajectory(Euler(), DATA, X, SIGMAS, every=every)
