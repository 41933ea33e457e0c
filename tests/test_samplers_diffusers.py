"""Whole trajectories of every scheduler class, against torch diffusers with the same noise."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import scheduler_peers
import tiny
from scheduler_peers import SD, theirs

from sdjax.diffusion import profiles
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.model import FrozenConfig

LOW = {"final_sigmas_type": "sigma_min"}
EPS = {"algorithm_type": "dpmsolver"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SDE_EPS = {"algorithm_type": "sde-dpmsolver"}
V, X0 = {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}
ZERO = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **V}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
TRAILING, LINSPACE = ({"timestep_spacing": name} for name in ("trailing", "linspace"))
SPACED = {
    "leading": LEADING,
    "trailing": TRAILING,
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "v": V,
    "x0": X0,
}
WITHOUT_X0 = {name: change for name, change in SPACED.items() if name != "x0"}
THREE, HIGH = {"solver_order": 3}, {"lower_order_final": False}
PLMS = {"skip_prk_steps": True}

CONFIGS = {
    "DPMSolverMultistepScheduler": {
        "plain": {},
        **SPACED,
        "lu": {"use_lu_lambdas": True},
        "karras-low": {"use_karras_sigmas": True, **LOW},
        "trailing-low": {**TRAILING, **LOW},
        "three": THREE,
        "three-low": {**THREE, **LOW},
        "three-high": {**THREE, **HIGH, **LOW},
        "three-euler": {**THREE, **LOW, "euler_at_final": True},
        "three-zero": {**THREE, **ZERO},
        "eps": {**EPS, **LOW},
        "eps-v": {**EPS, **LOW, **V},
        "eps-x0": {**EPS, **LOW, **X0},
        "eps-one": {**EPS, **LOW, "solver_order": 1},
        "eps-heun": {**EPS, **LOW, "solver_type": "heun"},
        "eps-three": {**EPS, **LOW, **THREE},
        "sde": SDE,
        "sde-low": {**SDE, **LOW},
        "sde-karras": {**SDE, "use_karras_sigmas": True},
        "sde-one": {**SDE, "solver_order": 1},
        "sde-heun": {**SDE, "solver_type": "heun"},
        "sde-three": {**SDE, **THREE},
        "sde-eps": {**SDE_EPS, **LOW},
        "sde-eps-heun": {**SDE_EPS, **LOW, "solver_type": "heun"},
    },
    "DPMSolverMultistepInverseScheduler": {
        "plain": {},
        "leading": LEADING,
        "trailing": TRAILING,
        "karras": SPACED["karras"],
        "v": V,
        "three": THREE,
        "eps": EPS,
    },
    "DPMSolverSinglestepScheduler": {
        "plain": {},
        **{name: SPACED[name] for name in ("karras", "exponential", "beta", "v", "x0")},
        "low": LOW,
        "lower": {**LOW, "lower_order_final": True},
        "heun": {"solver_type": "heun"},
        "one": {"solver_order": 1},
        "three": THREE,
        "three-low": {**THREE, **LOW},
        "three-heun": {**THREE, "solver_type": "heun"},
        "eps": {**EPS, **LOW},
        "eps-three": {**EPS, **LOW, **THREE},
        "sde": SDE,
        "sde-three": {**SDE, **THREE},
        "sde-three-heun": {**SDE, **THREE, "solver_type": "heun"},
    },
    "DEISMultistepScheduler": {
        "plain": {},
        **SPACED,
        "one": {"solver_order": 1},
        "three": THREE,
        "three-high": {**THREE, **HIGH},
    },
    "UniPCMultistepScheduler": {
        "plain": {},
        **SPACED,
        "low": LOW,
        "karras-low": {"use_karras_sigmas": True, **LOW},
        "trailing-low": {**TRAILING, **LOW},
        "zero": ZERO,
        "high": {**HIGH, **LOW},
        "one": {"solver_order": 1},
        "three": THREE,
        "bh1": {"solver_type": "bh1", **LOW},
        "eps": {"predict_x0": False, **LOW},
        "eps-three": {"predict_x0": False, **THREE, **LOW},
        "uncorrected": {"disable_corrector": [0, 2, 3], **THREE},
    },
    "SASolverScheduler": {
        "plain": {},
        **SPACED,
        "one": {"predictor_order": 1, "corrector_order": 1},
        "four": {"predictor_order": 3, "corrector_order": 4},
        "high": HIGH,
        "eps": {"algorithm_type": "noise_prediction"},
        "eps-three": {
            "algorithm_type": "noise_prediction",
            "predictor_order": 3,
            "corrector_order": 3,
        },
    },
    "PNDMScheduler": {
        "plain": {**PLMS, "steps_offset": 1},
        "one": {**PLMS, "set_alpha_to_one": True},
        "nowhere": PLMS,
        "trailing": {**PLMS, **TRAILING},
        "linspace": {**PLMS, **LINSPACE},
        "v": {**PLMS, **V, "steps_offset": 1},
        "v-linspace": {**PLMS, **V, **LINSPACE},
        "prk": {"steps_offset": 1},
        "prk-v": V,
        "prk-linspace": LINSPACE,
    },
    "IPNDMScheduler": {"plain": {}},
    "LCMScheduler": {
        "plain": {},
        "v": V,
        "clip": {"clip_sample": True},
        "near": {"timestep_scaling": 0.01},
        "original": {"original_inference_steps": 100},
    },
    "TCDScheduler": {"plain": {}, "v": V, "x0": X0},
    "DDIMInverseScheduler": {
        "plain": {"clip_sample": False},
        "trailing": {"clip_sample": False, **TRAILING},
        "v": {"clip_sample": False, **V},
        "clip": {"clip_sample_range": 0.7, "set_alpha_to_one": False},
        "x0": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **X0},
    },
    "DDIMScheduler": {"clip": {}, "clip-trailing": {"clip_sample_range": 0.7, **TRAILING}},
    "DDPMScheduler": {
        "large": {"clip_sample": False, "variance_type": "fixed_large", "steps_offset": 1},
        "log": {"clip_sample": False, "variance_type": "fixed_small_log"},
    },
    "EDMEulerScheduler": {
        "plain": {},
        "v": V,
        "exponential": {"sigma_schedule": "exponential"},
        "low": {**LOW, "sigma_data": 1.0},
    },
    "EDMDPMSolverMultistepScheduler": {
        "plain": {},
        "v": V,
        "exponential": {"sigma_schedule": "exponential"},
        "low": LOW,
        "three": THREE,
        "sde": SDE,
    },
    "CMStochasticIterativeScheduler": {
        "plain": {},
        "unclipped": {"clip_denoised": False, "s_noise": 1.1, "sigma_data": 0.7},
    },
    "LMSDiscreteScheduler": {"plain": {}, **SPACED},
    "KDPM2DiscreteScheduler": {"plain": {}, **WITHOUT_X0},
    "KDPM2AncestralDiscreteScheduler": {"plain": {}, **WITHOUT_X0},
    "DPMSolverSDEScheduler": {"plain": {}, **WITHOUT_X0},
    "EulerDiscreteScheduler": {"beta": SPACED["beta"]},
    "EulerAncestralDiscreteScheduler": {"trailing": TRAILING},
    "HeunDiscreteScheduler": {"beta": SPACED["beta"], "trailing": TRAILING, "v": V, "x0": X0},
}
OWN = ("IPNDMScheduler", "EDM", "CM")  # no betas
STEPS = (1, 2, 3, 10, 25)
# In diffusers' float32, SA's coefficients, differences of polynomials in lambda, lose 2e-5.
ILL = ("SASolverScheduler",)


def config(cls, name):
    betas = {} if cls.startswith(OWN) else SD
    return {"_class_name": cls, **betas, **CONFIGS[cls][name]}


@functools.cache
def found(cls):
    """{(name, n): relative distance}; Runge-Kutta's start takes four steps."""
    prk = {name for name in CONFIGS[cls] if name.startswith("prk")}
    runs = {}
    for names, steps in ((set(CONFIGS[cls]) - prk, STEPS), (prk, (4, 10, 25))):
        configs = {name: config(cls, name) for name in CONFIGS[cls] if name in names}
        runs |= scheduler_peers.gaps(configs, steps, cls in ILL) if configs else {}
    return runs


@pytest.mark.parametrize("cls", CONFIGS)
def test_trajectories_end_where_diffusers_ends(cls):
    for (name, n), gap in found(cls).items():
        assert gap <= (2e-4 if n <= 3 else 2e-5), (name, n, gap)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ddim_with_eta_ends_where_diffusers_ends(eta):
    """Between leading and trailing timesteps, with both last alphas."""
    configs = {
        f"{spacing}-{last}": {
            "_class_name": "DDIMScheduler",
            **SD,
            "clip_sample": False,
            "timestep_spacing": spacing,
            "set_alpha_to_one": last,
        }
        for spacing in ("leading", "trailing")
        for last in (False, True)
    }
    for (name, n), gap in scheduler_peers.gaps(configs, (2, 10), eta=eta).items():
        assert gap <= (2e-4 if n <= 3 else 2e-5), (name, n, gap)


@pytest.mark.parametrize("cls", CONFIGS)
def test_timesteps_and_sigmas_are_diffusers(cls):
    for name, n in itertools.product(CONFIGS[cls], (*STEPS, 50)):
        if name.startswith("prk") and n < 4:
            continue
        asked = config(cls, name)
        if n == 50 and (cls.startswith(("CM", "TCD", "LCM", "KDPM2")) or "Inverse" in cls):
            continue  # more than there are, or slow there
        plan, peer = profiles.diffusers(asked, n), theirs(asked)
        peer.set_timesteps(n)
        timesteps, sigmas = peer.timesteps.numpy(), getattr(peer, "sigmas", None)
        if cls == "PNDMScheduler":
            first = timesteps[:12:4] if name.startswith("prk") else timesteps[:2]
            rest = timesteps[12:] if name.startswith("prk") else timesteps[3:]
            timesteps = np.append(first, rest)[:n]
        if cls.startswith(("KDPM2", "DPMSolverSDE")):
            timesteps = timesteps[::2]
        if cls.startswith("Heun"):
            timesteps = np.append(timesteps[:1], timesteps[1::2])
        if cls.startswith(("KDPM2", "DPMSolverSDE", "Heun")):
            sigmas = np.concatenate([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])[: n + 1]
        np.testing.assert_allclose(plan.timesteps, timesteps, rtol=4e-7, atol=1e-5, err_msg=name)
        if sigmas is not None:
            scale = plan.final_scale if cls.startswith(OWN) else 1
            mine = (plan.sigmas * scale).astype("f")
            rtol = 2e-5 if "zero" in name else 2e-6
            np.testing.assert_allclose(mine, np.asarray(sigmas)[: n + 1], rtol=rtol, err_msg=name)
        elif cls not in ("IPNDMScheduler", "DDIMInverseScheduler"):
            mine = 1 / (1 + plan.sigmas[:-1] ** 2)
            want = peer.alphas_cumprod.numpy()[timesteps.astype(int)]
            np.testing.assert_allclose(mine, want, rtol=2e-7, err_msg=name)


@pytest.mark.parametrize(
    ("cls", "change", "said"),
    [
        ("DPMSolverMultistepScheduler", EPS, "final_sigmas_type"),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order"),
        ("DPMSolverMultistepScheduler", {**SDE_EPS, **LOW, **THREE}, "solver_order"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "flow"),
        ("DPMSolverMultistepInverseScheduler", SDE, "sde"),
        ("DPMSolverSinglestepScheduler", {**SDE_EPS, **LOW}, "algorithm_type"),
        ("DEISMultistepScheduler", {"solver_type": "magic"}, "solver_type"),
        ("UniPCMultistepScheduler", {"solver_type": "magic"}, "solver_type"),
        ("UniPCMultistepScheduler", {"disable_corrector": 3}, "disable_corrector"),
        ("SASolverScheduler", {"predictor_order": 5}, "predictor_order"),
        ("SASolverScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type"),
        ("PNDMScheduler", X0, "prediction_type"),
        ("LCMScheduler", {"original_inference_steps": 5}, "original_inference_steps"),
        ("EDMEulerScheduler", X0, "prediction_type"),
        ("EDMEulerScheduler", {"sigma_data": 0.0}, "sigma_data"),
        ("IPNDMScheduler", {"trained_betas": [0.1]}, "trained_betas"),
        ("DDIMInverseScheduler", LINSPACE, "linspace"),
        ("DDPMScheduler", {"variance_type": "magic"}, "variance_type"),
        ("CMStochasticIterativeScheduler", {"num_train_timesteps": 9}, "steps"),
    ],
)
def test_what_diffusers_cannot_do_is_refused_by_key(cls, change, said):
    with pytest.raises(InputError, match=said):
        profiles.diffusers({"_class_name": cls, **change}, 10)


@pytest.mark.parametrize("name", profiles.SAMPLERS)
def test_a_sampler_by_name_takes_the_levels_of_its_class(name):
    """With a model whose own config is another class's, and with one of its own class's keys."""
    from sdjax.tasks.plan import choose

    model, _ = tiny.sd1()
    for own in ({}, {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1", **V}):
        config = {**tiny.SCHEDULER, **own}
        scheduler, schedule = FrozenConfig.of(config), Schedule.from_config(config)
        model = dataclasses.replace(model, scheduler=scheduler, schedule=schedule)
        plan = choose(model, 10, name)
        assert type(plan.sampler) is profiles.SAMPLERS[name] and plan.note is None
        # For ten evaluations; and to the lowest level, then to 0.
        steps = {"dpm_fast": 4, "dpm_adaptive": 2}.get(name, 10)
        assert len(plan.timesteps) == steps and len(plan.sigmas) == steps + 1
        if name == "lcm":
            assert plan.sampler.skips.shape == (10,) and plan.sigmas[-1] == 0
        if name == "plms":
            assert plan.sigmas[-1] > 0 and plan.sampler.landings is None


def test_folders_may_name_every_class():
    from sdjax.checkpoints.folder import SCHEDULER_CLASS

    for cls in CONFIGS:
        assert SCHEDULER_CLASS.fullmatch(cls), cls


def test_runge_kuttas_start_needs_four_steps():
    with pytest.raises(InputError, match="at least 4"):
        profiles.diffusers({"_class_name": "PNDMScheduler", **SD}, 3)


def test_notes_say_what_differs():
    for kind in ("learned", "learned_range", "fixed_large_log"):
        plan = profiles.diffusers({"_class_name": "DDPMScheduler", "variance_type": kind}, 4)
        assert kind in plan.note
