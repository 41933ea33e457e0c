"""One battery that every sampler passes by being listed, and each against its own equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import QUICK

from sdjax.diffusion import noise, sampling, spacings
from sdjax.diffusion.analytic import Gaussian, GaussianMixture
from sdjax.diffusion.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, EulerAncestral, Heun
from sdjax.diffusion.samplers.euler import ancestral
from sdjax.errors import InputError
from sdjax.types import leaves32

SAMPLERS = {
    "euler": Euler(),
    "euler-churn": Euler(s_churn=4.0, s_tmin=0.3, s_tmax=20.0, s_noise=1.01),
    "ancestral": EulerAncestral(),
    "ancestral-half": EulerAncestral(eta=0.5, s_noise=0.9),
    "heun": Heun(),
    "heun-churn": Heun(s_churn=4.0, s_tmin=0.3, s_tmax=20.0, s_noise=1.01),
    "ddim": DDIM(),
    "ddim-eta": DDIM(eta=0.7),
    "ddpm": DDPM(),
    "ddpm-large": DDPM("fixed_large"),
    "dpmpp_2m": DPMSolverPP2M(),
    "dpmpp_2m-heun": DPMSolverPP2M("heun"),
}
SHAPE = (3, 2, 2, 1)
N = 6
DRAWS = np.random.default_rng(0).standard_normal((N, *SHAPE)).astype(np.float32)
START = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
SIGMAS = spacings.karras(N, 0.1, 10.0)
MIXTURE = GaussianMixture(
    jnp.asarray([0.4, 0.6]),
    jnp.asarray([-1.0, 1.5]).reshape(2, 1, 1, 1),
    jnp.asarray([0.5, 0.8]),
)


def mixture64(x, sigma):
    """The same denoiser, written again in float64 numpy."""
    total = np.array([0.25, 0.64]) + sigma**2
    means = np.array([-1.0, 1.5])
    away = x[:, None] - means[None, :, None, None, None]
    log = -0.5 * (away**2).sum((2, 3, 4)) / total - 0.5 * x[0].size * np.log(total)
    log += np.log([0.4, 0.6])
    share = np.exp(log - log.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    each = means[:, None, None, None] + (np.array([0.25, 0.64]) / total)[:, None, None, None] * away
    return (share[..., None, None, None] * each).sum(1)


@functools.partial(jax.jit, compiler_options=QUICK)
def run(sampler, x, sigmas, draws):
    return sampling.sample(sampler, MIXTURE, x, sigmas, noise.Tape(draws))


@functools.partial(jax.jit, compiler_options=QUICK)
def slopes(sampler, x, sigmas):
    """The sum of squares of where a run ends, and its gradients."""

    def loss(x, sigmas, sampler):
        data = Gaussian(0.7, 1.3)
        return jnp.sum(sampling.sample(sampler, data, x, sigmas, noise.Tape(DRAWS)) ** 2)

    return jax.value_and_grad(loss, (0, 1, 2))(x, sigmas, sampler)


def go(sampler, x, sigmas, draws=DRAWS):
    return np.asarray(run(leaves32(sampler), x, np.asarray(sigmas, np.float32), draws))


def equations(name, x, sigmas, draws):
    """k-diffusion's and diffusers' equations, independently, in float64."""
    s, n, d = SAMPLERS[name], len(sigmas) - 1, mixture64
    x, old, h_last = x.astype(float), None, None
    for i in range(n):
        a, b, z = sigmas[i], sigmas[i + 1], draws[i].astype(float)
        if name.startswith(("euler", "heun")):
            gamma = min(s.s_churn / n, 2**0.5 - 1) if s.s_tmin <= a <= s.s_tmax else 0
            hat = a * (gamma + 1)
            x = x + z * s.s_noise * (hat**2 - a**2) ** 0.5
            slope = (x - d(x, hat)) / hat
            there = x + slope * (b - hat)
            if name.startswith("heun") and b > 0:
                there = x + (slope + (there - d(there, b)) / b) / 2 * (b - hat)
            x = there
        elif name.startswith("ancestral"):
            up = min(b, s.eta * (b**2 * (a**2 - b**2) / a**2) ** 0.5)
            down = (b**2 - up**2) ** 0.5
            x = x + (x - d(x, a)) / a * (down - a) + z * s.s_noise * up
        elif name.startswith("dd"):  # alpha-bar space, as in the papers
            at, ap = 1 / (1 + a**2), 1 / (1 + b**2)
            x0, vp = d(x, a), x * at**0.5
            eps = (vp - at**0.5 * x0) / (1 - at) ** 0.5
            small = (1 - ap) / (1 - at) * (1 - at / ap)
            if name.startswith("ddim"):
                std = s.eta * small**0.5
                vp = ap**0.5 * x0 + (1 - ap - std**2) ** 0.5 * eps + std * z
            else:
                beta = 1 - at / ap
                vp = (ap**0.5 * beta * x0 + (at / ap) ** 0.5 * (1 - ap) * vp) / (1 - at)
                if b > 0:
                    vp = vp + (small if s.variance == "fixed_small" else beta) ** 0.5 * z
            x = vp / ap**0.5
        else:
            x0 = d(x, a)
            if old is None or b == 0:
                x = b / a * x + (1 - b / a) * x0
            else:
                h, r = np.log(a / b), h_last / np.log(a / b)
                d1 = (x0 - old) / r
                half = -0.5 * np.expm1(-h) if s.solver == "midpoint" else np.expm1(-h) / h + 1
                x = b / a * x - np.expm1(-h) * x0 + half * d1
            h_last = np.log(a / b) if b else None
            old = x0
    return x


@pytest.fixture(params=SAMPLERS)
def name(request):
    return request.param


def test_trajectories_follow_the_equations(name):
    for last in (0.0, 0.03):
        sigmas = np.append(SIGMAS[:-1], last)
        want = equations(name, START * 10, sigmas, DRAWS)
        got = go(SAMPLERS[name], START * 10, sigmas)
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_ragged_batches_equal_each_image_alone(name):
    """Unequal step counts and schedules in one program, one of them empty."""
    rows = [spacings.karras(n, 0.1, top) for n, top in ((6, 10.0), (2, 4.0))]
    rows.append(np.append(spacings.karras(4, 0.2, 8.0)[:-1], 0.05))
    sigmas = spacings.pad(rows)
    batch = go(SAMPLERS[name], START * 5, sigmas)
    for i, row in enumerate(rows):
        alone = go(
            SAMPLERS[name], START[i : i + 1] * 5, spacings.pad([row], N + 1), DRAWS[:, i : i + 1]
        )
        np.testing.assert_allclose(batch[i], alone[0], rtol=2e-6, atol=2e-6)
        shared = equations(name, START[i : i + 1] * 5, row, DRAWS[:, i : i + 1])
        np.testing.assert_allclose(batch[i], shared[0], atol=2e-5 * np.abs(shared).max())


def test_a_step_that_goes_nowhere_ends_the_image(name):
    """So the first steps of a schedule do not depend on how many would follow, for each solver."""
    if "churn" in name:
        pytest.skip("churn is spread over the steps there are")
    stop = np.concatenate([SIGMAS[:4], np.repeat(SIGMAS[3], 3)])
    want = equations(name, START * 10, SIGMAS[:4], DRAWS)
    got = go(SAMPLERS[name], START * 10, stop)
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    empty = go(SAMPLERS[name], START, np.zeros(N + 1))
    np.testing.assert_array_equal(empty, START)


def test_few_steps_and_gradients_are_finite(name):
    rows = [SIGMAS[[0, -1]], SIGMAS[[0, 3, -1]], SIGMAS[[0, 2, 4, -1]]]  # n = 1, 2, 3
    sigmas = jnp.asarray(spacings.pad(rows, N + 1), jnp.float32)
    value, grads = slopes(leaves32(SAMPLERS[name]), START, sigmas)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads[0]).max() > 0


def test_equal_samplers_share_a_program(name):
    sampler, traces = SAMPLERS[name], []

    @jax.jit
    def count(sampler):
        traces.append(1)
        return 0

    whole = jax.tree.map(lambda leaf: int(leaf) if float(leaf).is_integer() else leaf, sampler)
    for same in (sampler, whole, jax.tree.map(lambda leaf: leaf * 0.5, sampler)):
        count(leaves32(same))
    assert len(traces) == 1
    assert hash(sampler) == hash(whole)


def test_structures_of_unlike_samplers_differ():
    kinds = [Euler(), EulerAncestral(), Heun(), DDIM(), DDPM(), DPMSolverPP2M()]
    assert len({str(jax.tree.structure(k)) for k in kinds}) == 6
    assert jax.tree.structure(Euler()) != jax.tree.structure(Heun())
    assert not any(a == b for i, a in enumerate(kinds) for b in kinds[:i])


def test_ddim_is_euler_in_sigma_space():
    euler = go(Euler(), START * 10, SIGMAS)
    for other in (DDIM(), EulerAncestral(eta=0.0)):
        np.testing.assert_allclose(go(other, START * 10, SIGMAS), euler, rtol=1e-5, atol=1e-5)


def test_ddim_at_eta_1_is_ddpm_is_euler_ancestral():
    ddpm = go(DDPM(), START * 10, SIGMAS)
    for other in (DDIM(eta=1.0), EulerAncestral()):
        np.testing.assert_allclose(go(other, START * 10, SIGMAS), ddpm, rtol=1e-4, atol=1e-4)


def test_levels_of_an_ancestral_step_add_up():
    for eta in (0.0, 0.5, 1.0, 1.7):
        down, up = ancestral(jnp.float32(2), jnp.float32(0.5), eta)
        np.testing.assert_allclose(down**2 + up**2, 0.25, rtol=1e-6)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_orders_are_as_stated(name, order):
    """Steps even in log sigma, down to a level above 0, against a fine run in float64."""
    x = START * 4
    fine = equations("heun", x, np.geomspace(4, 0.2, 2049), np.zeros((2048, 1)))
    errors = []
    for n in (24, 48):
        sigmas = np.geomspace(4, 0.2, n + 1)
        got = equations(name, x, sigmas, np.zeros((n, 1)))
        errors.append(np.abs(got - fine).max())
        mine = go(SAMPLERS[name], x, sigmas, np.zeros((n, *SHAPE), np.float32))
        np.testing.assert_allclose(mine, got, atol=2e-5)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


STOCHASTIC = ["euler-churn", "ancestral", "heun-churn", "ddim-eta", "ddpm"]


@pytest.mark.parametrize("name", STOCHASTIC)
def test_chains_end_in_the_gaussian(name):
    """Mean and variance over 4,096 chains, within 3 standard errors and the solver's own bias."""
    data, chains, n = Gaussian(0.7, 1.3), 4096, 300
    sampler = leaves32(SAMPLERS[name])
    if "churn" in name:  # s_noise 1: exact in the limit
        sampler = type(sampler)(jnp.float32(4.0))
    sigmas = spacings.karras(n, 0.02, 40.0).astype(np.float32)
    keys = noise.keys(range(chains))
    x = 0.7 + jnp.sqrt(1.3**2 + 40.0**2) * noise.start(keys, (1, 1, 1))
    whole = jax.jit(lambda *args: sampling.sample(*args, sigmas, keys), compiler_options=QUICK)
    x = np.asarray(whole(sampler, data, x))
    assert abs(x.mean() - 0.7) < 3 * 1.3 / chains**0.5
    assert abs(x.var() / 1.3**2 - 1) < 3 * (2 / chains) ** 0.5 + 0.03


@pytest.mark.parametrize("field", ["eta"])
def test_numbers_of_a_sampler_may_be_mapped_over(field):
    etas = jnp.asarray([0.0, 0.7])
    many = jax.vmap(lambda eta: run(DDIM(eta), START, SIGMAS.astype("f"), DRAWS))(etas)
    for eta, x in zip(etas, many, strict=True):
        np.testing.assert_allclose(x, go(DDIM(float(eta)), START, SIGMAS), rtol=1e-4, atol=1e-5)


def test_unknown_options_are_refused():
    with pytest.raises(InputError, match="variance"):
        DDPM("learned")
    with pytest.raises(InputError, match="solver"):
        DPMSolverPP2M("euler")
    with pytest.raises(InputError, match="first_order_at_end"):
        DPMSolverPP2M(first_order_at_end="sometimes")
