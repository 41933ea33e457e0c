"""Discretisations and whole trajectories against torch diffusers' schedulers."""

import collections
import dataclasses
import functools
import inspect
import itertools
import json
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scheduler_peers import FAST

import sdjax
from sdjax.diffusion import noise, profiles, sampling
from sdjax.diffusion.plan import batch, bounded
from sdjax.diffusion.samplers import DDIM, PNDM, EulerAncestral
from sdjax.diffusion.schedules import Schedule, planned_timestep, to_x0
from sdjax.errors import InputError
from sdjax.model import FrozenConfig
from sdjax.tasks.plan import choose
from sdjax.types import leaves32

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
THRESHOLD = {
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.6,
    "sample_max_value": 1.5,
}
SHAPE = (4, 4, 2)

CONFIGS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim-one": ("DDIMScheduler", {"clip_sample": False}),
    "ddim-trailing": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "ddim-linspace": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "linspace"}),
    "ddim-zero": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing", **ZERO}),
    "ddim-v": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "v_prediction"}),
    "ddim-x0": ("DDIMScheduler", {"clip_sample": False, "prediction_type": "sample"}),
    "ddim-cosine": ("DDIMScheduler", {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}),
    "ddim-threshold": ("DDIMScheduler", THRESHOLD),
    "ddpm-threshold": ("DDPMScheduler", THRESHOLD | {"clip_sample": True}),
    "dpm-threshold": ("DPMSolverMultistepScheduler", THRESHOLD | {"use_karras_sigmas": True}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddpm-clip": ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 0.6}),
    "ddpm-large": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    "ddpm-trailing": ("DDPMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler-linspace": ("EulerDiscreteScheduler", {}),
    "euler-trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "euler-karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-karras-ends": (
        "EulerDiscreteScheduler",
        {
            "use_karras_sigmas": True,
            "sigma_min": 0.1,
            "sigma_max": 9.0,
            "final_sigmas_type": "sigma_min",
        },
    ),
    "euler-exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}),
    "euler-log": ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}),
    "euler-min": ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
    "euler-zero": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", **ZERO}),
    "euler-edm": (
        "EulerDiscreteScheduler",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
        },
    ),
    "ancestral": (
        "EulerAncestralDiscreteScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "ancestral-linspace": ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction"}),
    "heun": ("HeunDiscreteScheduler", {}),
    "heun-leading": ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "heun-karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun-exponential": ("HeunDiscreteScheduler", {"use_exponential_sigmas": True}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "dpm-leading": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1},
    ),
    "dpm-trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "dpm-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm-exponential": ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    "dpm-heun": ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    "dpm-first": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
    "dpm-min": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    "dpm-min-high": (
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    ),
    "dpm-min-euler": (
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
    ),
    "dpm-v": ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
    "dpm-cosine": (
        "DPMSolverMultistepScheduler",
        {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    ),
    "dpm-clipped": (
        "DPMSolverMultistepScheduler",
        {"lambda_min_clipped": -2.0, "timestep_spacing": "trailing"},
    ),
    "dpm-zero": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing", **ZERO}),
}
STEPS = (1, 2, 3, 7, 10, 30, 50, 500)


COSINE = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}


def _config(name):
    if (
        name == "dpm-cosine-karras"
    ):  # diffusers cannot run it: it looks its first step up by timestep
        return {"_class_name": "DPMSolverMultistepScheduler", **SD, **COSINE}
    cls, config = CONFIGS[name]
    return {"_class_name": cls, **SD, **config}


def _theirs(config):
    diffusers = pytest.importorskip("diffusers")
    keys = {k: v for k, v in config.items() if k != "_class_name"}
    return getattr(diffusers, config["_class_name"])(**keys)


def network(x, timestep):
    """A stand-in for a network, the same arithmetic for torch and jax."""
    return 0.6 * x + 0.3 * x * x / (1 + x * x) + 0.0005 * timestep * x / (1 + x * x)


def _torch_run(config, steps, x, draws):
    """diffusers' loop, from unit noise to its result; the stand-in does not care for NCHW."""
    import torch

    theirs = _theirs(config)
    theirs.set_timesteps(steps)
    tape = iter(torch.from_numpy(d)[None] for d in draws)
    module = type(theirs).__module__
    x = torch.from_numpy(x)[None] * theirs.init_noise_sigma
    with unittest.mock.patch(f"{module}.randn_tensor", lambda *a, **k: next(tape), create=True):
        for t in theirs.timesteps:
            out = network(theirs.scale_model_input(x, t), t)
            x = theirs.step(out, t, x).prev_sample
    return x[0].numpy()


def _denoise(schedule, sigmas, timesteps, x, sigma):
    t = planned_timestep(schedule, sigma, sigmas, timesteps)
    return to_x0(schedule, network(x / jnp.sqrt(1 + sigma**2), t), x, sigma)


@functools.partial(jax.jit, static_argnums=0, compiler_options=FAST)
def _run(schedule, sampler, sigmas, timesteps, clip, threshold, x, draws):
    denoise = bounded(functools.partial(_denoise, schedule, sigmas, timesteps), clip, threshold)
    return sampling.sample(sampler, denoise, x, sigmas, noise.Tape(draws))


def _cases(cls):
    """Runs that can share one program: [(schedule, [(name, steps, plan)])]."""
    groups = collections.defaultdict(list)
    for name in CONFIGS:
        config = _config(name)
        if config["_class_name"] != cls:
            continue
        for steps in (1, 2, 3, 10, 21):
            plan = profiles.diffusers(config, steps)
            schedule = Schedule.from_config(config)
            kind = jax.tree.structure(plan.sampler)
            if isinstance(plan.sampler, DDIM):
                kind = DDIM, plan.sampler.threshold
            groups[schedule, kind, plan.clip, plan.threshold].append((name, steps, plan))
    return [(key[0], runs) for key, runs in groups.items()]


@pytest.mark.parametrize("cls", sorted({cls for cls, _ in CONFIGS.values()}))
def test_trajectories_end_where_diffusers_ends(cls):
    """Each run is one image of a batch with unequal step counts: two claims at once."""
    rng = np.random.default_rng(0)
    for schedule, runs in _cases(cls):
        x = rng.standard_normal((len(runs), *SHAPE), np.float32)
        draws = rng.standard_normal((21, len(runs), *SHAPE), np.float32)
        plan = leaves32(batch([plan for *_, plan in runs])._replace(note=None))
        fields = (plan.sampler, plan.sigmas, plan.timesteps, plan.clip, plan.threshold)
        ours = _run(schedule, *fields, x * plan.init_scale, draws) * plan.final_scale
        for i, (name, steps, _) in enumerate(runs):
            theirs = _torch_run(_config(name), steps, x[i], draws[:, i])
            gap = np.abs(ours[i] - theirs).max() / np.abs(theirs).max()
            # From sigma 4096, x + (sigma_next - sigma) d loses 2e-4 in diffusers' own float32.
            bound = 5e-4 if name == "euler-zero" else 2e-5
            assert gap <= bound, (name, steps, gap)


@pytest.mark.parametrize("name", [*CONFIGS, "dpm-cosine-karras"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_timesteps_and_sigmas_are_diffusers(name):
    for steps in STEPS:
        _compare(name, _config(name), steps)


def _compare(name, config, steps):
    plan = profiles.diffusers(config, steps)
    theirs = _theirs(config)
    theirs.set_timesteps(steps)
    timesteps = theirs.timesteps.numpy()
    if "Heun" in config["_class_name"]:
        timesteps = np.concatenate([timesteps[:1], timesteps[1::2]])
    np.testing.assert_allclose(
        plan.timesteps, timesteps, rtol=2e-7, atol=1e-4 if "log" in name else 1e-5
    )
    if hasattr(theirs, "sigmas"):
        sigmas = theirs.sigmas.numpy()
        if "Heun" in config["_class_name"]:
            sigmas = np.concatenate([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
        np.testing.assert_allclose(
            plan.sigmas.astype("f"),
            sigmas[: steps + 1],
            rtol=2e-5 if "zero" in name else 1e-6 if "log" in name else 4e-7,
        )
    a = theirs.alphas_cumprod.numpy().astype(float)
    if config["_class_name"] in ("DDIMScheduler", "DDPMScheduler"):
        mine = 1 / (1 + plan.sigmas[:-1] ** 2)
        np.testing.assert_allclose(
            mine, a[timesteps], rtol=1e-5 if "zero" in name else 1e-12, atol=1e-14
        )
        assert plan.init_scale == pytest.approx(np.sqrt(1 + plan.sigmas[0] ** 2))
    elif config["_class_name"] == "DPMSolverMultistepScheduler":
        assert plan.init_scale == pytest.approx(np.sqrt(1 + plan.sigmas[0] ** 2))
    else:
        assert plan.init_scale == pytest.approx(float(theirs.init_noise_sigma), rel=3e-7)
    assert plan.note is None


def test_stable_diffusions_own_config_is_plms():
    config = {**SD, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    plan = profiles.diffusers({"_class_name": "PNDMScheduler", **config}, 10)
    ddim = profiles.diffusers({"_class_name": "DDIMScheduler", "clip_sample": False, **config}, 10)
    assert plan.sampler == PNDM() and ddim.sampler == DDIM()
    assert plan.note is None
    np.testing.assert_array_equal(plan.sigmas, ddim.sigmas)
    assert plan.sigmas[-1] > 0 and plan.final_scale < 1


def test_plms_of_unequal_steps_is_one_batch_that_ends_where_diffusers_ends():
    """In the spacings where its second go leaves from a level of its own for some counts only."""
    shared = {"_class_name": "PNDMScheduler", **SD, "skip_prk_steps": True}
    configs = [shared | {"timestep_spacing": name} for name in ("trailing", "linspace")]
    runs = [(config, steps) for config in configs for steps in (1, 7, 20)]
    plan = batch([profiles.diffusers(*run) for run in runs])
    x = np.random.default_rng(0).standard_normal((len(runs), *SHAPE), np.float32)
    fields = leaves32((plan.sampler, plan.sigmas, plan.timesteps))
    draws = np.zeros((20, *x.shape), np.float32)  # it takes none
    ours = _run(Schedule(), *fields, None, None, x * plan.init_scale, draws) * plan.final_scale
    for i, run in enumerate(runs):
        theirs = _torch_run(*run, x[i], [])
        assert np.abs(ours[i] - theirs).max() / np.abs(theirs).max() <= 2e-5, run


PIPELINES = {
    "StableDiffusionPipeline": ("sd1", "sd2-base", "sd2"),
    "StableDiffusionInpaintPipeline": ("sd1-inpaint", "sd2-inpaint"),
    "StableDiffusionXLPipeline": ("sdxl",),
    "StableDiffusionXLInpaintPipeline": ("sdxl-inpaint",),
    "StableDiffusionXLImg2ImgPipeline": ("sdxl-refiner",),
    "StableDiffusionUpscalePipeline": ("x4-upscaler",),
}


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_has_the_scheduler_that_its_pipeline_makes_of_the_config(pipeline):
    """Pipelines of Stable Diffusion 1 and 2 put keys into the config, those of XL do not."""
    diffusers = pytest.importorskip("diffusers")
    cls = getattr(diffusers, pipeline)
    takes = inspect.signature(cls.__init__).parameters
    parts = {p.name: None for p in takes.values() if p.default is p.empty and p.name != "self"}
    parts |= {name: False for name in ("requires_safety_checker",) if name in takes}
    model, _ = tiny.sd1()
    said = {"steps_offset": 0}
    for family, config in itertools.product(
        PIPELINES[pipeline],
        (
            {"_class_name": "DDIMScheduler"},
            {"_class_name": "DDIMScheduler", **said, "clip_sample": True},
            {"_class_name": "PNDMScheduler"},
            {"_class_name": "PNDMScheduler", **said, "skip_prk_steps": False},
        ),
    ):
        case, config = (family, config), config | SD
        theirs = cls(**parts | {"scheduler": _theirs(config)}).scheduler
        theirs.set_timesteps(10)
        mine = dataclasses.replace(
            model, family=family, scheduler=FrozenConfig.of(config), schedule=Schedule()
        )
        plan = choose(mine, 10)
        assert plan.timesteps[0] == theirs.timesteps[0], case
        if "skip_prk_steps" in theirs.config:
            assert plan.sampler.runge_kutta is not theirs.config.skip_prk_steps, case
        else:
            np.testing.assert_array_equal(plan.timesteps, theirs.timesteps)
            assert (plan.sampler.clip is not None) is theirs.config.clip_sample, case
        named = diffusers.DDIMScheduler.from_config(theirs.config)
        named.set_timesteps(10)
        np.testing.assert_array_equal(choose(mine, 10, "ddim").timesteps, named.timesteps)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_folder_without_offset_and_clipping_is_sampled_as_its_pipeline_does(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    tiny.save_sd1(tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "DDIMScheduler", **SD}))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "model").scheduler
    theirs.set_timesteps(7)
    plan = choose(sdjax.load(tmp_path / "model")[0], 7)
    np.testing.assert_array_equal(plan.timesteps, theirs.timesteps)
    assert theirs.timesteps[-1] == 1 and theirs.config.clip_sample is False
    assert plan.sampler.clip is None


def test_what_is_left_out_is_said():
    plan = profiles.diffusers({**_config("ddpm"), "variance_type": "learned"}, 10)
    assert plan.note == "variance_type learned needs a variance that the network does not tell"


def test_thresholding_takes_the_place_of_clipping_where_diffusers_knows_it():
    on = {**SD, "thresholding": True, "clip_sample": True}
    for name, config, want in (
        ("DDPMScheduler", {}, (0.995, 1.0, 1.0)),
        ("LCMScheduler", {"sample_max_value": 2.0}, (0.995, 1.0, 2.0)),
        ("EDMDPMSolverMultistepScheduler", {"sigma_data": 0.5}, (0.995, 2.0, 2.0)),
        ("UniPCMultistepScheduler", {}, (0.995, 1.0, 1.0)),
        ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}, None),
        ("TCDScheduler", {}, None),
        ("EulerDiscreteScheduler", {}, None),
    ):
        plan = profiles.diffusers({"_class_name": name, **on, **config}, 4)
        assert plan.threshold == want and plan.clip is None and plan.note is None
    ddim = profiles.diffusers({"_class_name": "DDIMScheduler", **on}, 4)
    assert ddim.sampler.threshold == (0.995, 1.0, 1.0) and ddim.sampler.clip is None
    assert ddim.threshold is None  # it leaves the direction alone


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name"),
        ({"timestep_spacing": "sideways"}, "timestep_spacing"),
        ({"timestep_spacing": 3}, "timestep_spacing"),
        ({"steps_offset": "1"}, "steps_offset"),
        ({"steps_offset": 1000}, "steps_offset"),
        ({"steps_offset": -1}, "steps_offset"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps"),
        ({"num_train_timesteps": True}, "num_train_timesteps"),
        ({"beta_start": float("nan")}, "beta_start"),
        ({"beta_end": 1.5}, "beta_end"),
        ({"beta_schedule": "magic"}, "beta_schedule"),
        ({"prediction_type": "flow"}, "prediction_type"),
        ({"trained_betas": [0.1, "x"]}, "trained_betas"),
        ({"trained_betas": [0.1, 2.0]}, "trained_betas"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one"),
        ({"thresholding": True, "sample_max_value": 0}, "sample_max_value"),
        (THRESHOLD | {"dynamic_thresholding_ratio": 2}, "dynamic_thresholding_ratio"),
    ],
)
def test_bad_configs_are_refused_by_key(change, said):
    config = {"_class_name": "DDIMScheduler", "clip_sample": False, **SD, **change}
    with pytest.raises(InputError, match=said):
        profiles.diffusers(config, 10)


@pytest.mark.parametrize("steps", [0, -1, True, 1001])
def test_bad_step_counts_are_refused(steps):
    with pytest.raises(InputError, match="steps"):
        profiles.diffusers(_config("ddim"), steps)


@pytest.mark.parametrize("spacing", profiles.SPACINGS)
@pytest.mark.parametrize("sampler", profiles.SAMPLERS)
def test_any_sampler_takes_any_spacing(sampler, spacing):
    schedule = Schedule()
    plan = profiles.k_diffusion(schedule, sampler, spacing, 12)
    assert type(plan.sampler) is profiles.SAMPLERS[sampler]
    steps = 13 if spacing == "ddim_uniform" else 12  # every 83rd of 1000
    steps = len(plan.timesteps) if sampler == "dpm_fast" else steps  # as many evaluations
    steps = 2 if sampler == "dpm_adaptive" else steps  # to the lowest level, and to 0
    assert plan.sigmas.shape == (steps + 1,) and plan.timesteps.shape == (steps,)
    assert (np.diff(plan.sigmas) < 0).all() and plan.sigmas[-1] == 0
    np.testing.assert_allclose(schedule.timestep(plan.sigmas[:-1]), plan.timesteps, atol=0.02)
    if spacing in ("karras", "exponential"):
        assert plan.init_scale == pytest.approx(schedule.sigma_max) == plan.sigmas[0]
        assert plan.init_scale == pytest.approx(14.615, abs=1e-3)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="sampler"):
        profiles.k_diffusion(Schedule(), "magic", "karras", 5)
    with pytest.raises(InputError, match="spacing"):
        profiles.k_diffusion(Schedule(), EulerAncestral(), "magic", 5)


def test_stable_diffusion_starts_at_its_three_scales():
    ddim = profiles.diffusers(_config("ddim"), 1000 // 20)
    assert ddim.init_scale == pytest.approx(np.sqrt(1 + ddim.sigmas[0] ** 2))
    full = profiles.diffusers(_config("euler-trailing"), 20)
    assert full.init_scale == pytest.approx(14.6146, abs=1e-3)


def test_a_batch_refuses_unlike_samplers():
    plans = [profiles.diffusers(_config(name), 5) for name in ("ddim", "euler")]
    with pytest.raises(InputError, match="one kind"):
        batch(plans)
