"""The scan: whole, in segments, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from peers import QUICK

from sdjax.diffusion import guidance, noise, sampling, spacings
from sdjax.diffusion.analytic import Gaussian, GaussianMixture
from sdjax.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, EulerAncestral, Heun
from sdjax.errors import InputError
from sdjax.types import leaves32, pytree

DATA = Gaussian(0.5, 1.0)
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 2), np.float32)) * 10
SIGMAS = spacings.karras(7, 0.1, 10.0).astype(np.float32)
KEYS = noise.keys([3, 4])
quick = functools.partial(jax.jit, compiler_options=QUICK)


@functools.cache
def whole(sampler):
    return quick(sampling.sample)(leaves32(sampler), DATA, X, SIGMAS, KEYS)


@pytest.mark.parametrize("sampler", [DPMSolverPP2M(), EulerAncestral()])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_segments_give_what_the_whole_gives_with_one_program(sampler, length):
    """7 steps in segments of 3 overhang the end by two."""
    traces = []

    def count(*args, length):
        traces.append(1)
        return sampling.scan(*args, length=length)

    segment = quick(count, static_argnames="length", donate_argnums=2)
    want, sampler = whole(sampler), leaves32(sampler)
    carry = sampling.begin(sampler, X + 0)
    for start in range(0, 7, length):
        carry = segment(sampler, DATA, carry, SIGMAS, KEYS, start, length=length)
    np.testing.assert_allclose(carry.x, want, rtol=1e-6, atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("length", [2, 4])
def test_segments_of_ragged_schedules(length):
    sigmas = spacings.pad([spacings.karras(n, 0.1, 10.0) for n in (3, 7)]).astype(np.float32)
    segment = quick(sampling.scan, static_argnums=6)
    want = quick(sampling.sample)(leaves32(DPMSolverPP2M()), DATA, X, sigmas)
    carry = sampling.begin(DPMSolverPP2M(), X)
    for start in range(0, 7, length):
        carry = segment(leaves32(DPMSolverPP2M()), DATA, carry, sigmas, None, start, length)
    np.testing.assert_allclose(carry.x, want, rtol=1e-6, atol=1e-6)


def test_nothing_is_shown_sigma_0_nor_asked_past_the_end():
    seen = []

    def denoise(x, sigma):
        jax.debug.callback(lambda s: seen.append(np.asarray(s).ravel().tolist()), sigma)
        return DATA(x, sigma)

    sigmas = spacings.pad([np.array([4.0, 2.0, 0.0]), np.array([3.0, 0.0])]).astype(np.float32)
    sampling.sample(Euler(), denoise, X, sigmas).block_until_ready()
    jax.effects_barrier()
    assert sorted(seen) == [[2.0, 3.0], [4.0, 3.0]]
    seen.clear()
    carry = sampling.begin(Euler(), X)
    sampling.scan(Euler(), denoise, carry, sigmas, None, 2, 5).x.block_until_ready()
    jax.effects_barrier()
    assert seen == []


@pytree
class Recorder:
    """A sampler of one's own: it writes down where it stands."""

    def init(self, x):
        return jnp.full((x.shape[0], 8, 4), -1.0)

    def step(self, denoise, x, at, state, noise):
        row = jnp.stack([jnp.broadcast_to(v, (x.shape[0], 1, 1, 1)).ravel() for v in at], -1)
        where = jnp.broadcast_to(at.index, (x.shape[0], 1, 1, 1)).ravel()
        return x + 1, state.at[jnp.arange(x.shape[0]), where].set(row)


def test_steps_know_their_place_and_finished_images_are_frozen():
    sigmas = spacings.pad([np.array([4.0, 2.0, 1.0, 0.5]), np.array([3.0, 0.0])]).astype("f")
    carry = sampling.scan(Recorder(), DATA, sampling.begin(Recorder(), X), sigmas)
    np.testing.assert_array_equal(
        carry.x - X > 2, [[[[True] * 2] * 4] * 4, [[[False] * 2] * 4] * 4]
    )
    np.testing.assert_array_equal(carry.state[0, :3], [[0, 3, 4, 2], [1, 2, 2, 1], [2, 1, 1, 0.5]])
    np.testing.assert_array_equal(carry.state[1, :2], [[0, 1, 3, 0], [-1] * 4])
    assert (carry.state[:, 3:] == -1).all()


def test_keys_are_white_noise():
    a = sampling.sample(EulerAncestral(), DATA, X, SIGMAS, KEYS)
    b = sampling.sample(EulerAncestral(), DATA, X, SIGMAS, noise.White(KEYS, X.shape[1:]))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sampler", [EulerAncestral(), DDPM(), DDIM(eta=0.5), Euler(s_churn=1.0)])
def test_a_sampler_that_draws_refuses_no_noise(sampler):
    def never(x, sigma):
        raise AssertionError("traced")

    with pytest.raises(InputError, match="draws noise"):
        sampling.sample(sampler, never, X, SIGMAS)


def test_deterministic_samplers_need_no_noise_even_traced():
    for sampler in (Euler(), DDIM(), DPMSolverPP2M(), EulerAncestral(eta=0)):
        x = quick(lambda s: sampling.sample(s, DATA, X, SIGMAS))(leaves32(sampler))
        assert np.isfinite(x).all()
    loud = quick(lambda s: sampling.sample(s, DATA, X, SIGMAS))(leaves32(DDIM(eta=1.0)))
    assert np.isnan(loud).all()


def test_a_sampler_without_a_declaration_is_caught_when_it_draws():
    @pytree
    class Mine:
        def init(self, x):
            return ()

        def step(self, denoise, x, at, state, noise):
            return x + noise(at.sigma, at.sigma_next), state

    with pytest.raises(InputError, match="Mine draws noise"):
        sampling.sample(Mine(), DATA, X, SIGMAS)


def test_bad_arguments_are_refused():
    for bad in (np.zeros(1), np.zeros((4, 3, 1, 1, 1)), np.zeros((4, 2))):
        with pytest.raises(InputError, match="sigmas"):
            sampling.sample(Euler(), DATA, X, bad)
    with pytest.raises(InputError, match="finite"):
        sampling.sample(Euler(), DATA, X, np.array([np.nan, 0.0]))
    for bad, said in (([9.0, 4, 4, 1, 0], "repeat"), ([0.0, 1, 4], "from 0"), ([9.0, 0, 1], "0")):
        with pytest.raises(InputError, match=said):
            sampling.sample(Euler(), DATA, X, np.array(bad))
    for fine in ([9.0, 4, 1, 0, 0, 0], [9.0, 4, 4], [1.0, 4, 9], [9.0, 1, 4, 0]):
        assert np.isfinite(sampling.sample(Euler(), DATA, X, np.array(fine))).all()
    with pytest.raises(InputError, match="one an image"):
        sampling.sample(Euler(), DATA, X, SIGMAS, noise.keys([1]))


def test_the_state_is_float32_whatever_the_start():
    half = sampling.sample(Euler(), DATA, X.astype(jnp.bfloat16), SIGMAS)
    assert half.dtype == jnp.float32


def test_eager_and_jitted_agree():
    eager = sampling.sample(DPMSolverPP2M(), DATA, X, SIGMAS)
    jitted = quick(sampling.sample)(leaves32(DPMSolverPP2M()), DATA, X, SIGMAS)
    x, state = sampling.begin(DPMSolverPP2M(), X)
    for i in range(7):
        x, state = sampling.scan(
            DPMSolverPP2M(), DATA, sampling.Carry(x, state), SIGMAS, None, i, 1
        )
    np.testing.assert_allclose(eager, jitted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(x, jitted, rtol=1e-6, atol=1e-6)


def _network(context, x, sigma):
    """A smooth stand-in: it sees its context, its noise level and its neighbours."""
    near = jnp.roll(x, 1, axis=1) - x
    return jnp.tanh(0.3 * x + 0.1 * near + context[:, None, None, None]) * 2 / (1 + 0.1 * sigma)


@pytest.mark.parametrize("sampler", [Heun(), DPMSolverPP2M(), DDIM(eta=0.5)])
def test_gradients_flow_to_everything(sampler):
    """To the noise, the context, the levels and the guidance scale, rematerialised, in float64,
    against finite differences.
    """
    sigmas = np.array([6.0, 2.5, 1.0, 0.3])

    def loss(x, context, sigmas, scale):
        denoise = guidance.remat(guidance.cfg(Partial(_network, context), scale))
        tape = noise.Tape(jnp.ones((3, 1, 2, 2, 1)))
        return jnp.sum(jnp.sin(sampling.sample(sampler, denoise, x, sigmas, tape)))

    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, 2, 1))) * 6
        at = (x, jnp.asarray([-0.4, 0.6]), jnp.asarray(sigmas), jnp.float64(3.0))
        slopes = quick(jax.grad(loss, (0, 1, 2, 3)))(*at)
        forward = quick(loss)
        for i, slope in enumerate(slopes):
            flat = np.asarray(at[i]).ravel()
            for j in range(flat.size):
                ends = []
                for side in (1e-5, -1e-5):
                    moved = flat.copy()
                    moved[j] += side
                    args = [*at[:i], jnp.asarray(moved.reshape(at[i].shape)), *at[i + 1 :]]
                    ends.append(forward(*args))
                found = (ends[0] - ends[1]) / 2e-5
                np.testing.assert_allclose(np.ravel(slope)[j], found, rtol=1e-5, atol=1e-7)
            assert np.abs(slope).max() > 1e-3


def test_levels_learn_to_beat_karras_on_unseen_noise():
    """Six steps of DPM-Solver++ 2M on a mixture: gradients through the run choose their levels, and
    the error to a fine run shrinks for seeds that were not looked at.
    """
    means = jnp.asarray([-1.0, -0.2, 1.5]).reshape(3, 1, 1, 1)
    data = GaussianMixture(jnp.asarray([0.3, 0.3, 0.4]), means, jnp.asarray([0.1, 0.2, 0.3]))
    low, high, n = 0.03, 14.0, 6
    seen, unseen = (high * noise.start(noise.keys(range(i, i + 64)), (1, 1, 1)) for i in (0, 1000))

    def error(sigmas, x, wanted):
        got = sampling.sample(DPMSolverPP2M(), data, x, sigmas)
        return jnp.mean((got - wanted) ** 2)

    @quick
    def fine(x):
        return sampling.sample(Heun(), data, x, spacings.karras(100, low, high).astype("f"))

    def levels(steps):
        """Falling by any positive steps in log sigma, from the same top to the same end."""
        share = jnp.cumsum(jax.nn.softmax(steps))[:-1]
        inner = jnp.exp(np.log(high) + share * np.log(low / high))
        return jnp.concatenate([jnp.float32([high]), inner, jnp.float32([low, 0.0])])

    karras = spacings.karras(n, low, high)
    begin = jnp.log(jnp.asarray(-np.diff(np.log(karras[:-1])), jnp.float32))
    np.testing.assert_allclose(levels(begin), karras, rtol=1e-4)
    wanted = fine(seen)

    @quick
    def learn(steps):
        def one(carry, _):
            steps, speed = carry
            slope = jax.grad(lambda s: jnp.log(error(levels(s), seen, wanted)))(steps)
            speed = 0.9 * speed + slope
            return (steps - 0.01 * speed, speed), None

        return jax.lax.scan(one, (steps, jnp.zeros_like(steps)), None, 150)[0][0]

    other = fine(unseen)
    before, after = (quick(error)(levels(s), unseen, other) for s in (begin, learn(begin)))
    assert after < before / 2
