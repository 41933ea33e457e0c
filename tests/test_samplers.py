"""DDIM and DDPM against their papers' equations, and what samplers have in common.

test_sampler_battery.py is the battery that every sampler passes.
"""

import jax
import jax.numpy as jnp
import k_diffusion
import numpy as np
import pytest
from peers import QUICK, relative_error
from sampler_runs import DRAWS, MIXTURE, SIGMAS, START, plain

from sdjax.diffusion import noise, profiles, sampling, spacings, trajectories
from sdjax.diffusion.analytic import Gaussian
from sdjax.diffusion.samplers import (
    DDIM,
    DDPM,
    TCD,
    DPMAdaptive,
    DPMFast,
    DPMSolverPP2M,
    Euler,
    EulerAncestral,
    Restart,
)
from sdjax.diffusion.stochastic import ancestral
from sdjax.errors import InputError
from sdjax.types import leaves32

SAMPLERS = {
    "ddim": DDIM(),
    "ddim-eta": DDIM(eta=0.7),
    "ddpm": DDPM(),
    "ddpm-large": DDPM("fixed_large"),
}


def go(sampler, sigmas=SIGMAS):
    return plain(sampler, START * 10, sigmas)[-1].x


def equations(name, x, sigmas):
    """In float64 and alpha-bar space, as in the papers."""
    s, denoise = SAMPLERS[name], k_diffusion.Mixture()
    for i, (a, b) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        z = DRAWS[i, 0].astype(float)
        at, ap = 1 / (1 + a**2), 1 / (1 + b**2)
        x0, vp = denoise(x, a), x * at**0.5
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
    return x


@pytest.mark.parametrize("name", SAMPLERS)
def test_trajectories_follow_the_equations(name):
    for last in (0.0, 0.03):
        sigmas = np.append(SIGMAS[:-1], last)
        assert (
            relative_error(go(SAMPLERS[name], sigmas), equations(name, START * 10, sigmas)) < 2e-5
        )


def test_ddim_is_euler_in_sigma_space():
    euler = go(Euler())
    for other in (DDIM(), EulerAncestral(eta=0.0)):
        np.testing.assert_allclose(go(other), euler, rtol=1e-5, atol=1e-5)


def test_ddim_at_eta_1_is_ddpm_is_euler_ancestral():
    ddpm = go(DDPM())
    for other in (DDIM(eta=1.0), EulerAncestral()):
        np.testing.assert_allclose(go(other), ddpm, rtol=1e-4, atol=1e-4)


def test_levels_of_an_ancestral_step_add_up():
    for eta in (0.0, 0.5, 1.0, 1.7):
        down, up = ancestral(jnp.float32(2), jnp.float32(0.5), eta)
        np.testing.assert_allclose(down**2 + up**2, 0.25, rtol=1e-6)


def test_numbers_of_a_sampler_may_be_mapped_over():
    etas = jnp.asarray([0.0, 0.7])

    def run(eta):
        tape = noise.Tape(DRAWS)
        denoise = leaves32(MIXTURE)
        return sampling.sample(DDIM(eta), denoise, START * 10, SIGMAS.astype("f"), tape)

    many = jax.vmap(run)(etas)
    for eta, x in zip(etas, many, strict=True):
        np.testing.assert_allclose(x, go(DDIM(float(eta))), rtol=1e-4, atol=1e-5)


def test_unknown_options_are_refused():
    with pytest.raises(InputError, match="variance"):
        DDPM("learned")
    with pytest.raises(InputError, match="solver"):
        DPMSolverPP2M("euler")
    with pytest.raises(InputError, match="first_order_at_end"):
        DPMSolverPP2M(first_order_at_end="sometimes")


def test_no_eta_needs_no_noise():
    """Where it is a number before tracing; test_sampling has the traced one, which draws NaN."""

    def never(x, sigma):
        raise AssertionError("traced")

    tape = noise.Tape(DRAWS[:2])
    for kind in profiles.SAMPLERS.values():
        if not hasattr(kind(), "eta"):
            continue
        sampler = kind(eta=0) if kind is not DPMAdaptive else kind(eta=0, rtol=1.0, atol=1.0)
        with jax.disable_jit():
            x = sampling.sample(leaves32(sampler), MIXTURE, START, SIGMAS[[0, 3, -1]], None)
            drawn = sampling.sample(leaves32(sampler), MIXTURE, START, SIGMAS[[0, 3, -1]], tape)
        np.testing.assert_array_equal(x, drawn, kind.__name__)
        with pytest.raises(InputError, match="draws noise"):
            sampling.sample(kind(eta=0.5), never, START, SIGMAS)


def test_tcd_without_gamma_is_euler_and_needs_no_noise():
    with jax.disable_jit():
        got, want = (
            sampling.sample(leaves32(sampler), MIXTURE, START * 10, SIGMAS, None)
            for sampler in (TCD(gamma=0), Euler())
        )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10, 20, 30, 31])
def test_by_name_dpm_fast_spends_an_evaluation_a_step(n):
    """On every third of the levels; where they are even in log sigma, so are k-diffusion's."""
    sigmas = spacings.exponential(n, 0.03, 14.6)
    sampler, levels = DPMFast().plan(sigmas)
    assert trajectories.evaluations(sampler, levels) == (n if n % 3 < 2 else n - 1)
    top = levels[0], levels[-1], len(levels)
    assert top == (sigmas[0], 0, n // 3 + 2)
    if n > 5:
        theirs = DPMFast.schedule(n - 3, 0.03, 14.6)[1]
        np.testing.assert_allclose(levels[:-1], theirs)
    kept, same = DPMFast(0, eta=0.3).plan(sigmas[:-1]) if n > 1 else DPMFast(0).plan(sigmas[:1])
    assert kept.remainder == 0 and len(same) == n


CHAINS = {
    "dpm_adaptive": (DPMAdaptive(eta=1.0, rtol=1e-4, atol=1e-5), np.array([40.0, 0.02, 0.0])),
    "restart": (Restart(), Restart.schedule(spacings.karras(40, 0.02, 40.0))),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_that_choose_their_steps_or_rise_again_end_in_the_gaussian(name):
    """Mean and variance over 4,096 chains, within 3 standard errors; the battery has the others."""
    (sampler, sigmas), chains = CHAINS[name], 4096
    keys = noise.keys(range(chains))
    x = 0.7 + jnp.sqrt(1.3**2 + 40.0**2) * noise.start(keys, (1, 1, 1))
    sigmas = sigmas.astype(np.float32)
    whole = jax.jit(lambda *args: sampling.sample(*args, sigmas, keys), compiler_options=QUICK)
    x = np.asarray(whole(leaves32(sampler), leaves32(Gaussian(0.7, 1.3)), x))
    assert abs(x.mean() - 0.7) < 3 * 1.3 / chains**0.5
    assert abs(x.var() / 1.3**2 - 1) < 3 * (2 / chains) ** 0.5
