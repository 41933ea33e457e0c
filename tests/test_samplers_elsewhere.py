"""Trajectories against ComfyUI's equations, from starting noise to the final x."""

import elsewhere
import jax
import jax.numpy as jnp
import k_diffusion
import numpy as np
import pytest
from peers import relative_error
from sampler_runs import (
    DRAWS,
    LONG,
    MIXTURE,
    SIGMAS,
    START,
    Counted,
    N,
    assert_follows,
    compiled,
    label,
    plain,
    recorded,
)
from test_sampler_battery import fine

from sdjax.diffusion import guidance, methods, names, profiles, sampling, spacings
from sdjax.diffusion.plan import Plan, batch, fitted
from sdjax.diffusion.samplers import (
    ERSDE,
    SEEDS2,
    SEEDS3,
    DPMSolverPP2M,
    DPMSolverPP2SAncestral,
    ExpHeun,
    GradientEstimation,
    HeunPP2,
    RESMultistep,
    Restart,
)
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.types import Step, leaves32

NOISY = [{}, {"eta": 0.6, "s_noise": 1.02}, {"eta": 0.0}, {"eta": 1.3}]
CASES = [
    *((RESMultistep, elsewhere.res_multistep, options) for options in [*NOISY, {"eta": 1.0}]),
    *((GradientEstimation, elsewhere.gradient_estimation, o) for o in ({}, {"gamma": 1.5})),
    *((ExpHeun, elsewhere.exp_heun, options) for options in [*NOISY, {"solver": "phi_1"}]),
    *((SEEDS2, elsewhere.seeds_2, options) for options in NOISY),
    *((SEEDS2, elsewhere.seeds_2, {"solver": "phi_2", "r": r}) for r in (0.3, 1.0)),
    *((SEEDS3, elsewhere.seeds_3, options) for options in [*NOISY, {"r1": 0.4, "r2": 0.9}]),
    *((ERSDE, elsewhere.er_sde, {"order": order}) for order in (1, 2, 3)),
    *((ERSDE, elsewhere.er_sde, {"scale": scale, "s_noise": 1.02}) for scale in ("sde", "ode")),
]


@pytest.mark.parametrize(("kind", "reference", "options"), CASES, ids=label)
def test_trajectories_and_their_cost_are_comfyuis(kind, reference, options):
    assert_follows(kind, reference, options)


def both_sides(x, sigma):
    """A unit Gaussian for the negatives, the mixture for the positives."""
    negative, positive = jnp.split(x, 2)
    sigma = sigma if sigma.ndim == 0 else jnp.split(sigma, 2)[0]
    return jnp.concatenate([negative / (1 + sigma**2), leaves32(MIXTURE)(positive, sigma)])


@pytest.mark.parametrize(
    ("kind", "reference", "options"),
    [
        *((RESMultistep, elsewhere.res_multistep_cfg_pp, {"eta": eta}) for eta in (0.0, 0.6)),
        *(
            (GradientEstimation, elsewhere.gradient_estimation_cfg_pp, o)
            for o in ({}, {"gamma": 3})
        ),
        (DPMSolverPP2M, elsewhere.dpmpp_2m_cfg_pp, {}),
        *(
            (DPMSolverPP2SAncestral, elsewhere.dpmpp_2s_ancestral_cfg_pp, {"eta": eta})
            for eta in (0.0, 1.0)
        ),
    ],
    ids=label,
)
def test_cfg_plus_plus_steps_along_the_negative_as_comfyui_does(kind, reference, options):
    right = k_diffusion.Mixture()

    def negative(x, sigma):
        return x / (1 + sigma**2)

    for scale, sigmas in ((0.6, SIGMAS), (1.7, SIGMAS[:4]), (0.3, SIGMAS[[0, -1]])):

        def guided(x, sigma, scale=scale):
            return negative(x, sigma) + scale * (right(x, sigma) - negative(x, sigma))

        want = reference(guided, negative, 10.0 * START, sigmas, recorded, **options)
        denoise = guidance.cfg(both_sides, scale)
        sampler = kind(**options, plus_plus=True)
        got = plain(sampler, 10 * START, sigmas, denoise=denoise)[-1].x
        assert relative_error(got, want) <= (2e-5 if len(sigmas) > 3 else 1e-3)


@pytest.mark.parametrize("name", names.CFG_PLUS_PLUS)
def test_names_in_cfg_pp_are_comfyuis_samplers(name):
    """Its own form of a sampler, or CFG++'s scales under it; A1111's DDIM is Euler's."""
    right = k_diffusion.Mixture()
    plain_name, method = names.apart(name, None)
    sampler = profiles.SAMPLERS[plain_name]()
    levels, scale = np.float32(SIGMAS), 0.6
    method = methods.prepared(method).suited(sampler)
    denoise = method(methods.Sides(both_sides, leaves32(MIXTURE), levels), scale)

    def negative(x, sigma):
        return x / (1 + sigma**2)

    def guided(x, sigma):
        return negative(x, sigma) + scale * (right(x, sigma) - negative(x, sigma))

    reference = getattr(elsewhere, name.replace("ddim", "euler"))
    want = reference(guided, negative, 10.0 * START, SIGMAS, recorded)
    got = plain(method.around(sampler), 10 * START, SIGMAS, denoise=denoise)[-1].x
    assert relative_error(got, want) <= 2e-5


def test_cfg_plus_plus_is_compiled_and_bounded_and_asks_for_cfg():
    sampler, x = RESMultistep(plus_plus=True), jnp.asarray(10 * START)
    sigmas = jnp.asarray(spacings.pad([SIGMAS, SIGMAS[:4], SIGMAS[:2]]), jnp.float32)
    denoise = guidance.clip(guidance.cfg(both_sides, 0.6), 1.2)
    got = jax.jit(sampling.sample)(leaves32(sampler), leaves32(denoise), x, sigmas)
    want = plain(sampler, 10 * START, SIGMAS, denoise=denoise)[-1].x
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    for unfit in (leaves32(MIXTURE), guidance.interval(denoise, leaves32(MIXTURE), 0.5, 2.0)):
        with pytest.raises(InputError, match="guidance.cfg"):
            jax.eval_shape(sampling.sample, sampler, unfit, x, sigmas)


CHURN = {"s_churn": 2.0, "s_tmin": 0.3, "s_tmax": 6.0, "s_noise": 1.01}


@pytest.mark.parametrize("churn", [{}, CHURN], ids=label)
def test_heunpp2_and_its_cost_are_comfyuis(churn):
    """It looks ahead in the run's levels: six steps to 0, three above it, two, and one."""
    for sigmas in (SIGMAS, SIGMAS[:4], SIGMAS[[0, 2, -1]], SIGMAS[[0, -1]]):
        theirs, ours = k_diffusion.Mixture(), Counted()
        want = elsewhere.heunpp2(theirs, 10.0 * START, sigmas, recorded, **churn)
        sampler = HeunPP2(**churn)
        got = plain(sampler, 10 * START, sigmas, denoise=ours)[-1].x
        assert relative_error(got, want) <= (2e-5 if len(sigmas) > 3 else 1e-3)
        assert ours.calls == theirs.calls


def test_heunpp2_takes_ragged_batches_compiled_and_has_gradients():
    rows = [SIGMAS, SIGMAS[:4], SIGMAS[[0, -1]]]
    plans = [Plan(*fitted(HeunPP2(), row), timesteps=row[:-1]) for row in rows]
    np.testing.assert_array_equal(batch(plans).sampler.levels, spacings.pad(rows))
    got = compiled(HeunPP2(spacings.pad(rows, LONG + 1)), 10 * START, rows)
    for i, row in enumerate(rows):
        x = 10.0 * START[i : i + 1]
        want = elsewhere.heunpp2(k_diffusion.Mixture(), x, row, recorded)
        np.testing.assert_allclose(got[i], want[0], rtol=1e-9)

    def loss(x, sigmas):
        return jnp.sum(sampling.sample(HeunPP2(sigmas), leaves32(MIXTURE), x, sigmas) ** 2)

    sigmas = jnp.asarray(spacings.pad(rows), jnp.float32)
    with jax.disable_jit():
        grads = jax.grad(loss, (0, 1))(jnp.asarray(10 * START), sigmas)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads)


def test_heunpp2_has_order_1():
    """Heun's slopes count by their levels, which are small in all steps but the first."""
    (x, want), steps = fine(), (24, 48, 96)
    ramps = [np.linspace(80.0 ** (1 / 7), 0.2 ** (1 / 7), n + 1) ** 7 for n in steps]
    got = compiled(HeunPP2(spacings.pad(ramps, LONG + 1)), np.repeat(x, 3, 0), ramps)
    errors = np.sqrt(np.mean((got - want) ** 2, (1, 2, 3)))
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.8 <= order <= 1.2, (order, errors)


@pytest.mark.parametrize(
    ("n", "segments"),
    [
        (N, {0.3: (3, 2, 4.0)}),
        (N, {0.1: (4, 1, 2.0), 1.0: (2, 3, 20.0)}),
        (N, {}),
        (N, {20.0: (4, 1, 2.0)}),  # above every level: none
        *((n, None) for n in (N, 20, 36)),
    ],
)
def test_restarts_and_their_cost_are_a1111s(n, segments):
    """The levels from `schedule`, then the run; noise by the rise's number."""
    sigmas = spacings.karras(n, 0.05, 12.0)
    levels = Restart.schedule(sigmas, segments)
    rises = np.flatnonzero(np.diff(levels) > 0)
    draws = np.zeros_like(DRAWS[: len(levels) - 1])
    draws[rises] = DRAWS[: len(rises)]
    theirs, ours = k_diffusion.Mixture(), Counted()
    want = elsewhere.restart(theirs, 10.0 * START, sigmas, recorded, segments, 1.02)
    got = plain(Restart(1.02), 10 * START, levels, draws, ours)[-1].x
    assert relative_error(got, want) <= 2e-5
    assert ours.calls == theirs.calls


def test_by_name_they_get_the_levels_of_their_run():
    schedule = Schedule()
    heunpp = profiles.k_diffusion(schedule, "heunpp2", "karras", 5)
    np.testing.assert_array_equal(heunpp.sampler.levels, heunpp.sigmas)
    for n, spacing in ((36, "karras"), (25, "sgm_uniform"), (10, "simple")):
        plain = profiles.k_diffusion(schedule, "heun", spacing, n)
        plan = profiles.k_diffusion(schedule, "restart", spacing, n)
        np.testing.assert_array_equal(plan.sigmas, Restart.schedule(plain.sigmas))
        inside = plan.sigmas[:-1]
        np.testing.assert_allclose(schedule.timestep(inside), plan.timesteps, atol=0.02)
        assert ((np.diff(plan.sigmas) > 0).sum() == n // 18) and plan.init_scale == plain.init_scale
    stays = np.array([3.0, 1.0, 0.2])  # it does not end at 0
    assert Restart().plan(stays)[1] is stays


def test_images_that_rise_beside_others_that_fall_come_out_as_alone():
    plans = [Restart.schedule(SIGMAS, {0.3: (3, 2, 4.0)}), SIGMAS, SIGMAS[:4]]
    got = compiled(Restart(), 10 * START, plans)
    for i, levels in enumerate(plans):
        alone = compiled(Restart(), 10 * START, [levels] * 3)
        np.testing.assert_allclose(got[i], alone[i], rtol=1e-9)


def test_the_two_step_exponential_solver_is_dpm_solver_2m_with_phi_weights():
    """res_multistep without noise, and "heun" of diffusers' multistep solver: one formula."""
    one, other = (
        plain(sampler, 10 * START, SIGMAS, double=True)[-1].x
        for sampler in (RESMultistep(), DPMSolverPP2M("heun"))
    )
    assert relative_error(one, other) < 1e-12


def test_unknown_options_are_refused():
    x, at = jnp.asarray(START), Step(*map(jnp.int32, (0, 1)), *map(jnp.float32, (2, 1)))
    for make, said in (
        (lambda: SEEDS2("phi_3"), "solver"),
        (lambda: ExpHeun("heun"), "solver"),
        (lambda: ERSDE(4), "order"),
        (lambda: ERSDE(scale="vp"), "scale"),
        (lambda: HeunPP2().step(MIXTURE, x, at, (), recorded), "levels"),
        (lambda: Restart.schedule(SIGMAS[:3]), "falling to 0"),
        (lambda: Restart.schedule(SIGMAS, {0.1: (1, 1, 2.0)}), "levels"),
    ):
        with pytest.raises(InputError, match=said):
            make()
