"""Trajectories against ComfyUI's equations, from starting noise to the final x."""

import elsewhere
import k_diffusion
import pytest
from peers import relative_error
from sampler_runs import DRAWS, MIXTURE, SIGMAS, START, plain

from sdjax.diffusion.samplers import (
    ERSDE,
    SEEDS2,
    SEEDS3,
    DPMSolverPP2M,
    ExpHeun,
    GradientEstimation,
    RESMultistep,
)
from sdjax.errors import InputError
from sdjax.types import leaves32

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


def recorded(i, sigma, sigma_next, k):
    return DRAWS[i, k].astype(float)


class Counted:
    """The mixture; it counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, sigma):
        self.calls += 1
        return leaves32(MIXTURE)(x, sigma)


def label(value):
    if isinstance(value, dict):
        return "-".join(f"{k}{v}" for k, v in value.items()) or "default"
    return value.__name__


@pytest.mark.parametrize(("kind", "reference", "options"), CASES, ids=label)
def test_trajectories_and_their_cost_are_comfyuis(kind, reference, options):
    """Six steps to 0, three to a level above it, two, and one; in float32 against float64."""
    for sigmas in (SIGMAS, SIGMAS[:4], SIGMAS[[0, 2, -1]], SIGMAS[[0, -1]]):
        theirs, ours = k_diffusion.Mixture(), Counted()
        want = reference(theirs, 10.0 * START, sigmas, recorded, **options)
        got = plain(kind(**options), 10 * START, sigmas, denoise=ours)[-1].x
        assert relative_error(got, want) <= (2e-5 if len(sigmas) > 3 else 1e-3)
        assert ours.calls == theirs.calls


def test_the_two_step_exponential_solver_is_dpm_solver_2m_with_phi_weights():
    """res_multistep without noise, and "heun" of diffusers' multistep solver: one formula."""
    one, other = (
        plain(sampler, 10 * START, SIGMAS, double=True)[-1].x
        for sampler in (RESMultistep(), DPMSolverPP2M("heun"))
    )
    assert relative_error(one, other) < 1e-12


def test_unknown_options_are_refused():
    for make, said in (
        (lambda: SEEDS2("phi_3"), "solver"),
        (lambda: ExpHeun("heun"), "solver"),
        (lambda: ERSDE(4), "order"),
        (lambda: ERSDE(scale="vp"), "scale"),
    ):
        with pytest.raises(InputError, match=said):
            make()
