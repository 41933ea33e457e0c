"""Trajectories against k-diffusion's equations, from starting noise to the final x."""

import functools

import jax
import jax.numpy as jnp
import k_diffusion
import numpy as np
import pytest
from peers import QUICK, relative_error
from sampler_runs import (
    MIXTURE,
    SIGMAS,
    START,
    Counted,
    assert_follows,
    compiled,
    label,
    plain,
    recorded,
)

from sdjax.diffusion import noise, profiles, sampling
from sdjax.diffusion.samplers import (
    DPM2,
    LMS,
    DPM2Ancestral,
    DPMAdaptive,
    DPMFast,
    DPMSolverPP2M,
    DPMSolverPP2MSDE,
    DPMSolverPP2SAncestral,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    Euler,
    EulerAncestral,
    Heun,
)
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.types import leaves32

CHURN = {"s_churn": 2.0, "s_tmin": 0.3, "s_tmax": 6.0, "s_noise": 1.01}
ANCESTRAL = [{}, {"eta": 0.6, "s_noise": 1.02}, {"eta": 0.0}, {"eta": 1.3}]
CASES = [
    *((Euler, k_diffusion.euler, options) for options in ({}, CHURN)),
    *((Heun, k_diffusion.heun, options) for options in ({}, CHURN)),
    *((DPM2, k_diffusion.dpm_2, options) for options in ({}, CHURN)),
    *((EulerAncestral, k_diffusion.euler_ancestral, options) for options in ANCESTRAL),
    *((DPM2Ancestral, k_diffusion.dpm_2_ancestral, options) for options in ANCESTRAL),
    *((LMS, k_diffusion.lms, {"order": order}) for order in (1, 2, 3, 4)),
    *((DPMSolverPP2SAncestral, k_diffusion.dpmpp_2s_ancestral, o) for o in ANCESTRAL),
    *((DPMSolverPPSDE, k_diffusion.dpmpp_sde, o) for o in [*ANCESTRAL, {"r": 0.3, "eta": 0.8}]),
    (DPMSolverPP2M, k_diffusion.dpmpp_2m, {}),
    *((DPMSolverPP2MSDE, k_diffusion.dpmpp_2m_sde, options) for options in ANCESTRAL),
    (DPMSolverPP2MSDE, k_diffusion.dpmpp_2m_sde, {"solver": "heun"}),
    *((DPMSolverPP3MSDE, k_diffusion.dpmpp_3m_sde, options) for options in ANCESTRAL),
]


@pytest.mark.parametrize(("kind", "reference", "options"), CASES, ids=label)
def test_trajectories_and_their_cost_are_k_diffusions(kind, reference, options):
    assert_follows(kind, reference, options)


@pytest.mark.parametrize("options", [{}, {"eta": 0.6, "s_noise": 1.02}, {"eta": 1.0}, {"eta": 1.3}])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 10])
def test_a_budget_is_spent_as_k_diffusion_spends_it(n, options):
    theirs, ours = k_diffusion.Mixture(), Counted()
    want = k_diffusion.dpm_fast(theirs, 10.0 * START, 10.0, 0.1, n, recorded, **options)
    sampler, sigmas = DPMFast.schedule(n, 0.1, 10.0, **options)
    got = plain(sampler, 10 * START, sigmas, denoise=ours)[-1].x
    assert relative_error(got, want) <= (2e-5 if n > 2 else 1e-3)
    assert ours.calls == theirs.calls == n


def test_budgets_may_differ_within_a_batch():
    budgets = (7, 3, 5)
    plans = [DPMFast.schedule(n, 0.1, 10.0) for n in budgets]
    each = np.reshape([float(sampler.remainder) for sampler, _ in plans], (3, 1, 1, 1))
    got = compiled(DPMFast(each), 10 * START, [sigmas for _, sigmas in plans])
    for i, n in enumerate(budgets):
        x = 10.0 * START[i : i + 1]
        want = k_diffusion.dpm_fast(k_diffusion.Mixture(), x, 10.0, 0.1, n, recorded)
        np.testing.assert_allclose(got[i], want[0], rtol=1e-9)


ADAPTIVE = [
    {},
    {"rtol": 1e-3, "atol": 1e-3},
    {"pcoeff": 0.2, "icoeff": 0.7, "dcoeff": 0.1, "accept_safety": 0.9},
    {"h_init": 4.7},  # the first attempt is rejected
    {"eta": 0.7, "s_noise": 1.02, "rtol": 0.02},
]
MANY = np.random.default_rng(3).standard_normal((1, 200, *START.shape)).astype(np.float32)


@functools.partial(jax.jit, compiler_options=QUICK)
def adapt(sampler, x, sigmas, draws):
    carry = sampling.begin(sampler, x)
    carry = sampling.scan(sampler, leaves32(MIXTURE), carry, sigmas, noise.Tape(draws))
    return carry.x, carry.state.nfe


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("options", ADAPTIVE, ids=label)
def test_each_image_adapts_as_k_diffusion_does_with_it_alone(options, order):
    sampler = leaves32(DPMAdaptive(order, **options))
    sigmas = np.array([10.0, 0.1], np.float32)
    x, nfe = adapt(sampler, 10 * START, sigmas, MANY)
    counts = set()
    for i in range(3):
        rows, model = slice(i, i + 1), k_diffusion.Mixture()

        def draw(_, sigma, sigma_next, k, rows=rows):
            return MANY[0, k, rows].astype(float)

        want, (accepted, rejected) = k_diffusion.dpm_adaptive(
            model, 10.0 * START[rows], 10.0, 0.1, draw, order=order, **options
        )
        assert relative_error(x[rows], want) <= 1e-3
        assert nfe[i] == model.calls == order * (accepted + rejected)
        counts.add((accepted, rejected))
        if "h_init" in options:
            assert rejected > 0
    if "rtol" in options:
        assert len(counts) > 1  # images go their own ways


def test_adaptive_steps_run_backwards_too():
    x = np.asarray(START, np.float32)
    got, nfe = adapt(leaves32(DPMAdaptive()), x, np.array([0.1, 10.0], np.float32), MANY)
    for i in range(3):
        model = k_diffusion.Mixture()
        want, _ = k_diffusion.dpm_adaptive(model, x[i : i + 1].astype(float), 0.1, 10.0, None)
        assert relative_error(got[i : i + 1], want) <= 1e-3 and nfe[i] == model.calls


def test_adaptive_steps_keep_to_their_tolerance_and_stop_at_every_level():
    """A tight tolerance follows the exact flow; more levels are more stops on the same way."""
    sampler = leaves32(DPMAdaptive(rtol=1e-4, atol=1e-4))
    want = k_diffusion.flow(k_diffusion.Mixture(), 10.0 * START, 10.0, 0.1, 400)
    for levels in ([10.0, 0.1], [10.0, 3.0, 2.0, 0.1]):
        tape = np.repeat(MANY, len(levels) - 1, 0)
        got, _ = adapt(sampler, 10 * START, np.array(levels, np.float32), tape)
        assert relative_error(got, want) < 1e-3


def test_by_name_adaptive_steps_run_between_the_ends_of_any_spacing():
    """As k-diffusion's call from sigma_max to sigma_min, whatever lies between; then the estimate
    there."""
    plans = [
        profiles.k_diffusion(Schedule(), "dpm_adaptive", spacing, n)
        for spacing, n in (("karras", 20), ("exponential", 7), ("karras", 2))
    ]
    for plan in plans[1:]:
        np.testing.assert_allclose(plan.sigmas, plans[0].sigmas)
        np.testing.assert_allclose(plan.timesteps, plans[0].timesteps, atol=1e-9)
    sigmas = np.asarray(plans[0].sigmas, np.float32)
    high, low = map(float, sigmas[:2])
    x, nfe = adapt(leaves32(plans[0].sampler), high * START, sigmas, np.repeat(MANY, 2, 0))
    for i in range(3):
        model = k_diffusion.Mixture()
        want, _ = k_diffusion.dpm_adaptive(model, high * START[i : i + 1], high, low, None)
        want = model(want, low)
        assert relative_error(x[i : i + 1], want) <= 1e-3 and nfe[i] == model.calls
    whole = profiles.k_diffusion(Schedule(), "dpm_adaptive", "karras", 1).sigmas
    np.testing.assert_allclose(whole, [high, 0.0], rtol=1e-6)


def test_a_controller_that_is_lost_gives_nan_and_ends():
    sigmas, x = np.array([10.0, 0.1], np.float32), 10 * START
    x[1] = np.nan
    got, nfe = adapt(leaves32(DPMAdaptive()), x, sigmas, MANY)
    assert np.isnan(got[1]).all() and np.isfinite(got[0]).all() and np.isfinite(got[2]).all()
    assert nfe[1] == 3
    short, _ = adapt(leaves32(DPMAdaptive(max_attempts=2)), x, sigmas, MANY)
    assert np.isnan(short).all()


def test_gradients_of_adaptive_steps_are_finite_differences():
    """In forward mode and float64: to the start and to the levels at both ends."""

    def loss(x, sigmas):
        return jnp.sum(sampling.sample(DPMAdaptive(), MIXTURE, x, sigmas) ** 2)

    with jax.enable_x64(True):
        at = (jnp.asarray(10 * START.astype(float)), jnp.asarray([10.0, 0.1]))
        way = tuple(jnp.cos(jnp.arange(a.size)).reshape(a.shape) for a in at)
        ahead = jax.jit(functools.partial(jax.jvp, loss), compiler_options=QUICK)
        slope = float(ahead(at, way)[1])
        moved = [
            float(ahead(tuple(a + step * w for a, w in zip(at, way, strict=True)), way)[0])
            for step in (1e-5, -1e-5)
        ]
    assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4)


def test_gradients_of_lms_reach_the_schedule():
    """Its weights are functions of the sigmas: finite differences, in float64."""

    def loss(sigmas):
        return jnp.sum(sampling.sample(LMS(), MIXTURE, x, sigmas) ** 2)

    with jax.enable_x64(True):
        x, sigmas = jnp.asarray(10 * START.astype(float)), jnp.asarray(SIGMAS)
        way = jnp.cos(jnp.arange(sigmas.size)).at[-1].set(0.0)
        both = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
        slope = float(both(sigmas)[1] @ way)
        moved = [float(both(sigmas + step * way)[0]) for step in (1e-5, -1e-5)]
    assert slope == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-4)


def test_unknown_options_are_refused():
    for make, said in (
        (lambda: LMS(5), "order"),
        (lambda: DPMAdaptive(4), "order"),
        (lambda: DPMSolverPP2MSDE("euler"), "solver"),
        (lambda: DPMFast.schedule(0, 0.1, 10.0), "evaluations"),
        (lambda: DPMFast.schedule(5, 0.0, 10.0), "sigma_min"),
    ):
        with pytest.raises(InputError, match=said):
            make()
    with pytest.raises(InputError, match="draws noise"):
        sampling.sample(DPMSolverPPSDE(), MIXTURE, jnp.asarray(START), SIGMAS)
