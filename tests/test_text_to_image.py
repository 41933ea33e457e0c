"""Whole pictures against torch diffusers: from prompts to uint8, every family."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from peers import (
    LITTLE,
    assert_same_pictures,
    few_layers,
    nchw,
    nhwc,
    relative_error,
    save_tiny_pipeline,
    torch_pictures,
    unit_noise,
)

import sdjax
from sdjax.diffusion import methods, profiles, trajectories
from sdjax.diffusion.plan import batch
from sdjax.tasks import settings
from sdjax.tasks.plan import choose

PROMPTS = ["a red house by the sea at night", "two boats"]
STEPS = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder and torch pipeline of a family, written once."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, save_tiny_pipeline(folder, family, **few_layers(family))
        return made[family]

    return make


def torch_latents(pipeline, prompt, negative, latents, **settings):
    asked = dict(num_inference_steps=STEPS, guidance_scale=7.5, output_type="latent") | settings
    return nhwc(pipeline(prompt, negative_prompt=negative, latents=nchw(latents), **asked).images)


@pytest.mark.parametrize("family", ["sd1", "sd2-base", "sd2", "sdxl"])
def test_ten_guided_steps_equal_diffusers(tiny, family):
    """Each image has a negative prompt of its own; SDXL's absent one is zeros, not empty text."""
    folder, pipeline = tiny(family)
    negatives = [None, "blurry"] if family == "sdxl" else ["", "blurry"]
    noise = unit_noise((2, 8, 8, 4))
    settings = dict(negative_prompts=negatives, steps=STEPS, guidance_scale=7.5, latents=noise)
    model, params = sdjax.load(folder)
    latents = sdjax.text_to_image(
        model, params, PROMPTS, height=64, width=64, output="latents", **settings
    )
    theirs = np.concatenate(
        [
            torch_latents(pipeline, prompt, negative, noise[i : i + 1])
            for i, (prompt, negative) in enumerate(zip(PROMPTS, negatives, strict=True))
        ]
    )
    assert relative_error(latents, theirs) <= 1e-4
    images = sdjax.text_to_image(model, params, PROMPTS, height=64, width=64, **settings)
    assert images.dtype == np.uint8 and images.shape == (2, 64, 64, 3)
    assert_same_pictures(images, torch_pictures(pipeline, theirs))


def test_inpainting_weights_fill_a_wholly_masked_grey_picture(tiny):
    import torch
    from PIL import Image

    folder, pipeline = tiny("sd1-inpaint")
    noise = unit_noise((1, 8, 8, 4))
    model, params = sdjax.load(folder)
    latents = sdjax.text_to_image(
        model, params, PROMPTS[0], steps=STEPS, latents=noise, height=64, width=64, output="latents"
    )
    vae = pipeline.vae
    encoded = vae.encode  # the pipeline draws from the posterior; the mean is what is compared
    vae.encode = lambda x: _Mode(encoded(x))
    with torch.no_grad():
        theirs = pipeline(
            PROMPTS[0],
            image=torch.zeros(1, 3, 64, 64),
            mask_image=Image.new("L", (64, 64), 255),
            strength=1.0,
            num_inference_steps=STEPS,
            latents=nchw(noise),
            height=64,
            width=64,
            output_type="latent",
        ).images
    assert relative_error(latents, nhwc(theirs)) <= 1e-4


class _Mode:
    """A posterior whose draw is its mean."""

    def __init__(self, posterior):
        self.latent_dist = self
        self.mean = posterior.latent_dist.mean

    def sample(self, generator=None):
        return self.mean


def test_the_refiner_starts_from_noise_like_diffusers_at_strength_one(tiny):
    import torch

    folder, pipeline = tiny("sdxl-refiner")
    noise = unit_noise((1, 8, 8, 4))
    model, params = sdjax.load(folder)
    latents = sdjax.text_to_image(
        model,
        params,
        PROMPTS[0],
        negative_prompts="blurry",
        steps=STEPS,
        latents=noise,
        height=64,
        width=64,
        output="latents",
    )
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    start = nchw(noise) * scheduler.init_noise_sigma
    with torch.no_grad():
        theirs = pipeline(
            PROMPTS[0],
            negative_prompt="blurry",
            # Four channels are latents, and with a denoising_start they are noisy already.
            image=start,
            denoising_start=0.0,
            strength=1.0,
            num_inference_steps=STEPS,
            guidance_scale=7.5,
            original_size=(64, 64),
            target_size=(64, 64),
            output_type="latent",
        ).images
    assert relative_error(latents, nhwc(theirs)) <= 1e-4


def test_the_upscaler_composes_from_denoiser_and_sample(tiny):
    import torch

    folder, pipeline = tiny("x4-upscaler")
    model, params = sdjax.load(folder)
    start, small = unit_noise((1, 16, 16, 4)), np.tanh(unit_noise((1, 16, 16, 3), 1))
    level, draw = 20, unit_noise((1, 16, 16, 3), 2)

    plan = profiles.diffusers(model.scheduler.dict(), STEPS)
    bar = sdjax.Schedule(beta_start=0.0001, beta_end=0.02).alphas_cumprod[level]
    noisy = np.float32(np.sqrt(bar) * small + np.sqrt(1 - bar) * draw)
    ids = np.concatenate([model.tokenizer([p]).ids for p in ("blurry", PROMPTS[0])])
    denoise = sdjax.cfg(
        sdjax.denoiser(
            model,
            params,
            sdjax.encode_text(model, params, ids).context,
            class_labels=np.array([level, level]),
            concat=np.concatenate([noisy, noisy]),
            timesteps=plan,
        ),
        9.0,
    )
    with pytest.raises(sdjax.InputError, match="a plan, or its pair"):
        sdjax.denoiser(model, params, {}, timesteps=plan.timesteps)
    sigmas = np.float32(plan.sigmas)
    x = sdjax.sample(plan.sampler, denoise, start * np.float32(plan.init_scale), sigmas)

    # The pipeline draws the small picture's noise from its generator: hand it ours.
    pipeline.low_res_scheduler.add_noise = lambda image, noise, t: nchw(
        np.float32(np.sqrt(bar) * small + np.sqrt(1 - bar) * draw)
    ).repeat(len(image), 1, 1, 1)
    with torch.no_grad():
        theirs = pipeline(
            PROMPTS[0],
            negative_prompt="blurry",
            image=nchw(small),
            noise_level=level,
            num_inference_steps=STEPS,
            guidance_scale=9.0,
            latents=nchw(start),
            output_type="latent",
        ).images
    assert relative_error(x * plan.final_scale, nhwc(theirs)) <= 1e-4


@pytest.fixture(scope="module")
def sd1(small):
    return sdjax.load(small[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder, save_tiny_pipeline(folder, "sd1", unet=LITTLE, vae={"layers_per_block": 1})


def pictures(sd1, prompts, **settings):
    return sdjax.text_to_image(*sd1, prompts, height=64, width=64, **settings)


@pytest.fixture(scope="module")
def compiled():
    """What has been compiled since it was cleared."""
    events = []

    def listen(event, seconds, **info):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


def test_new_prompts_seeds_and_guidance_never_recompile_and_a_step_count_compiles_once(
    sd1, compiled
):
    sampler = sdjax.EulerAncestral(eta=1)
    pictures(sd1, ["a", "b"], seeds=[0, 1], steps=3, sampler=sampler)
    compiled.clear()
    pictures(
        sd1,
        ["something else", "entirely"],
        negative_prompts=["ugly", None],
        seeds=[2**64 - 1, 2**32],
        guidance_scale=[3, 1.0],
        steps=[2, 3],
        sampler=sdjax.EulerAncestral(eta=0.5),
    )
    assert len(compiled) == 0
    pictures(sd1, ["a", "b"], seeds=[0, 1], steps=4, sampler=sampler)
    assert len(compiled) == 1


def test_an_image_does_not_depend_on_the_batch_around_it(sd1):
    asked = dict(steps=[3, 2, 3], guidance_scale=[7.5, 2.0, 1.0], seeds=[5, 6, 2**40 + 5])
    sampler = "dpmpp_2m_sde"  # its noise is a Brownian path of the seed's
    together = pictures(sd1, ["a", "b", "c"], sampler=sampler, **asked)
    asked = {name: values[::-1] for name, values in asked.items()}
    backwards = pictures(sd1, ["c", "b", "a"], sampler=sampler, **asked)
    assert_same_pictures(backwards[::-1], together)
    alone = pictures(sd1, "b", steps=2, guidance_scale=2.0, seeds=6, sampler=sampler)
    assert_same_pictures(alone[0], together[1])


def test_progress_changes_nothing_and_counts_every_step_when_it_is_done(sd1, monkeypatch):
    told, wait = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: told.append("ready") or wait(x))
    watched = pictures(sd1, "a", steps=3, progress=lambda *what: told.append(what))
    steps = [what for what in told if what == "ready" or what[0] == "steps"]
    assert steps == [word for i in (1, 2, 3) for word in ("ready", ("steps", i, 3))]
    assert_same_pictures(watched, pictures(sd1, "a", steps=3))


def test_seeds_differ_in_their_upper_bits(sd1):
    images = pictures(sd1, "a", seeds=[0, 2**32, 2**63], steps=1)
    assert (images[0] != images[1]).any() and (images[1] != images[2]).any()


def test_without_guidance_one_evaluation_a_step_gives_the_same_picture(sd1):
    alone = pictures(sd1, "a", guidance_scale=1, steps=3)
    beside = pictures(sd1, ["a", "b"], guidance_scale=[1, 4], steps=3)
    assert_same_pictures(alone[0], beside[0])


def guided_by_hand(pipeline, texts, latents, guide):
    """torch's own network and DDIM, one image, three steps: `guide(x0s, sigma)` puts the texts'
    estimates together.
    """
    import torch
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(3)
    ids = pipeline.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    x = nchw(latents)
    with torch.no_grad():
        context = pipeline.text_encoder(ids).last_hidden_state
        for t in scheduler.timesteps:
            bar = scheduler.alphas_cumprod[t]
            eps = pipeline.unet(x.repeat(len(texts), 1, 1, 1), t, context).sample
            x0s = [(x - (1 - bar) ** 0.5 * e) / bar**0.5 for e in eps.split(1)]
            x0 = guide(x0s, float(((1 - bar) / bar) ** 0.5))
            x = scheduler.step((x - bar**0.5 * x0) / (1 - bar) ** 0.5, t, x).prev_sample
    return nhwc(x)


def each(*values):
    return np.reshape(np.float32(values), (-1, 1, 1, 1))


def by_apg(eta, norm):
    from diffusers.guiders import AdaptiveProjectedGuidance
    from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer

    guider = AdaptiveProjectedGuidance(
        guidance_scale=3.0,
        eta=eta,
        adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=norm,
        use_original_formulation=True,
    )
    guider._step, guider.momentum_buffer = 5, MomentumBuffer(-0.5)
    return lambda x0s, sigma: guider.forward(x0s[1], x0s[0]).pred


def by_interval(low, high):
    return lambda x0s, sigma: x0s[0] + (4.0 if low < sigma <= high else 1.0) * (x0s[1] - x0s[0])


def by_perp_neg(weight):
    def guide(x0s, sigma):
        empty, negative, positive = x0s[0], x0s[1] - x0s[0], x0s[2] - x0s[0]
        along = (negative * positive).sum() / (positive * positive).sum()
        return empty + 4.0 * (positive - weight * (negative - along * positive))

    return guide


GUIDED = {
    "apg": (
        methods.AdaptiveProjected(each(0.0, 0.4), each(4.0, 9.0)),
        by_apg,
        (0.0, 4.0, 0.4, 9.0),
    ),
    "interval": (
        Partial(methods.limited, low=each(1.0, 0.1), high=6.0),
        by_interval,
        (1.0, 6.0, 0.1, 6.0),
    ),
    "perp_neg": (methods.Perpendicular(each(1.0, 0.5)), by_perp_neg, (1.0, 0.5)),
}


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_has_numbers_state_and_sides_of_each_images_own(sd1, small, compiled, name):
    """APG with diffusers' guider and momentum, an interval, a third side: each image alone. New
    numbers never recompile.
    """
    method, make, numbers = GUIDED[name]
    noise, texts = unit_noise((2, 8, 8, 4)), [["", "ugly", "a boat"], ["", "", "two houses"]]
    asked = dict(negative_prompts=["ugly", ""], guidance_scale=4.0, steps=3, sampler="ddim")

    def run(method):
        prompts = ["a boat", "two houses"]
        return pictures(sd1, prompts, latents=noise, guidance=method, output="latents", **asked)

    ours = run(method)
    half = len(numbers) // 2
    for i in range(2):
        guide = make(*numbers[i * half : (i + 1) * half])
        said = texts[i] if name == "perp_neg" else texts[i][1:]
        theirs = guided_by_hand(small[1], said, noise[i : i + 1], guide)
        assert relative_error(ours[i : i + 1], theirs) <= 1e-4
    compiled.clear()
    other = run(jax.tree.map(lambda number: number * 0.5, method))
    assert len(compiled) == 0 and (other != ours).any()


def test_a_name_is_the_papers_method_on_what_the_network_predicts(sd1, small):
    """rescale is the pipelines' `guidance_rescale`."""
    noise = unit_noise((2, 8, 8, 4))
    asked = dict(num_inference_steps=3, guidance_rescale=0.7, height=64, width=64)
    theirs = [
        torch_latents(small[1], word, "ugly", noise[i : i + 1], **asked)
        for i, word in enumerate(("a boat", "two houses"))
    ]
    ours = pictures(
        sd1,
        ["a boat", "two houses"],
        negative_prompts="ugly",
        latents=noise,
        steps=3,
        guidance="rescale",
        output="latents",
    )
    assert relative_error(ours, np.concatenate(theirs)) <= 1e-4


def test_a_name_in_cfg_pp_is_a_sampler_and_its_guidance(sd1):
    named = pictures(sd1, "a", steps=2, sampler="ddim_cfg_pp")
    apart = dict(sampler="ddim", guidance="cfg_plus_plus", guidance_scale=0.6)
    np.testing.assert_array_equal(named, pictures(sd1, "a", steps=2, **apart))


def test_a_plan_as_sampler_is_run_as_it_is(sd1):
    """The model's own plan gives the model's own picture, whatever `steps` says."""
    plan = profiles.diffusers(sd1[0].scheduler.dict(), 3)
    own = pictures(sd1, "a", steps=3)
    np.testing.assert_array_equal(pictures(sd1, "a", steps=9, sampler=plan), own)
    with pytest.raises(sdjax.InputError, match="leave spacing out"):
        choose(sd1[0], 3, plan, "karras")
    with pytest.raises(sdjax.InputError, match="of one image"):
        choose(sd1[0], 3, batch([plan, plan]))


def test_dpm_fast_by_name_takes_about_as_many_evaluations_as_steps(sd1):
    plans = [choose(sd1[0], n, "dpm_fast") for n in (20, 9, 4)]
    own = [choose(sd1[0], 10, "dpm_fast", "karras"), choose(sd1[0], 7, sdjax.DPMFast(eta=0.5))]
    counts = [int(trajectories.evaluations(p.sampler, p.sigmas)) for p in plans + own]
    assert counts == [19, 9, 4, 10, 7]
    assert np.ravel(batch(plans).sampler.remainder).tolist() == [2, 0, 1]  # one program


def test_recorded_noise_takes_the_place_of_the_seeds(sd1):
    shape = (3, 2, 8, 8, 4)
    draws = unit_noise(shape)
    start = unit_noise((2, 8, 8, 4), 1)
    asked = dict(latents=start, sampler=sdjax.EulerAncestral(), steps=3)
    both = pictures(sd1, ["a", "b"], seeds=[1, 2], noise=sdjax.Tape(draws), **asked)
    again = pictures(sd1, ["a", "b"], seeds=[3, 4], noise=sdjax.Tape(draws), **asked)
    assert (both == again).all()
    asked["latents"] = start[1:]
    second = pictures(sd1, ["b"], noise=sdjax.Tape(draws[:, 1:]), **asked)
    assert_same_pictures(second[0], both[1])


def test_keys_and_noise_of_ones_own_are_noise_too(sd1):
    """Whose kind is the sampler's: here a Brownian path an image."""
    asked = dict(sampler="dpmpp_2m_sde", steps=3, seeds=[1, 2])
    own = pictures(sd1, ["a", "b"], **asked)
    keys = sdjax.keys([1, 2])
    assert (own == pictures(sd1, ["a", "b"], noise=keys, **asked)).all()
    tree = sdjax.BrownianTree(keys, (8, 8, 4))
    assert (own == pictures(sd1, ["a", "b"], noise=tree, **asked)).all()


@pytest.mark.parametrize(
    "shape", [(2, 2, 8, 8, 4), (3, 1, 8, 8, 4), (3, 2, 4, 4, 4)], ids=["short", "images", "size"]
)
def test_a_tape_that_does_not_fit_is_refused(sd1, shape):
    noise = sdjax.Tape(np.zeros(shape, np.float32))
    with pytest.raises(sdjax.InputError, match="a tape for 3 steps holds draws"):
        pictures(sd1, ["a", "b"], steps=3, noise=noise, sampler="euler_ancestral")


@sdjax.pytree
class Weighted:
    """Euler towards a weighted estimate: a sampler with a table, a state and a flag of its own."""

    weights: Any
    eta: Any = 0.0
    flag: str = sdjax.static("plain")

    def init(self, x):
        return jnp.zeros((x.shape[0],))

    def step(self, denoise, x, at, state, noise):
        x0 = denoise(x, at.sigma) * self.weights.sum()
        return x0 + at.sigma_next / at.sigma * (x - x0) + 0 * self.eta, state + 1


@pytest.mark.parametrize("weights", [np.array([0.25, 0.75]), jnp.array([0.5, 0.25, 0.25])])
def test_a_samplers_own_tables_and_state_pass_through(sd1, weights):
    plain = pictures(sd1, ["a", "b"], sampler=sdjax.Euler(), steps=[2, 3], seeds=[1, 2])
    mine = pictures(sd1, ["a", "b"], sampler=Weighted(weights), steps=[2, 3], seeds=[1, 2])
    assert_same_pictures(mine, plain)


def test_hyper_parameters_are_numbers_arrays_or_one_an_image(sd1):
    def run(eta, prompts=("a", "b"), seeds=(1, 2)):
        asked = dict(sampler=sdjax.DDIM(eta), steps=3, seeds=list(seeds))
        return pictures(sd1, list(prompts), **asked)

    number = run(0.5)
    assert (run(np.array(0.5)) == number).all() and (run(jnp.float32(0.5)) == number).all()
    both = run(np.reshape([0.5, 1.0], (2, 1, 1, 1)))
    assert_same_pictures(both[0], number[0])
    assert_same_pictures(both[1], run(1.0)[1])


def test_settings_may_be_arrays(sd1):
    lists = pictures(sd1, ["a", "b"], guidance_scale=[2.0, 3.0], seeds=[1, 2], steps=2)
    arrays = dict(guidance_scale=jnp.array([2.0, 3.0]), seeds=np.array([1, 2]), steps=np.array(2))
    assert (pictures(sd1, ["a", "b"], **arrays) == lists).all()


def test_clip_skip_is_the_prompts_alone_as_in_diffusers(small):
    import torch

    folder, pipeline = small
    noise = unit_noise((1, 8, 8, 4))
    asked = dict(negative_prompts="ugly", steps=3, latents=noise, clip_skip=1, output="latents")
    ours = sdjax.text_to_image(*sdjax.load(folder), "a boat", height=64, width=64, **asked)
    # The pipeline's own clip_skip looks for a name that transformers 5.6 dropped: skip for it.
    encoder = pipeline.text_encoder
    ids = [
        pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        for text in ("a boat", "ugly")
    ]
    with torch.no_grad():
        skipped = encoder(ids[0], output_hidden_states=True).hidden_states[-2]
        embedded = encoder.final_layer_norm(skipped), encoder(ids[1]).last_hidden_state
    theirs = torch_latents(
        pipeline,
        None,
        None,
        noise,
        prompt_embeds=embedded[0],
        negative_prompt_embeds=embedded[1],
        num_inference_steps=3,
        height=64,
        width=64,
    )
    assert relative_error(ours, theirs) <= 1e-4


def test_pixels_that_are_not_finite_are_black_and_said(sd1):
    model, params = sd1
    conv = params["vae"]["decoder"]["conv_out"]
    broken = conv | {"bias": conv["bias"].at[0].set(jnp.nan)}
    vae = params["vae"] | {"decoder": params["vae"]["decoder"] | {"conv_out": broken}}
    with pytest.warns(RuntimeWarning, match=r"images \[0\] hold NaN"):
        images = pictures((model, params | {"vae": vae}), "a", steps=1)
    assert (images[..., 0] == 0).all()


def test_bfloat16_stays_within_two_levels_on_average(sd1, small):
    half = sdjax.load(small[0], dtype="bfloat16")
    exact = pictures(sd1, ["a", "b"], seeds=[1, 2], steps=STEPS)
    rounded = pictures(half, ["a", "b"], seeds=[1, 2], steps=STEPS)
    assert np.abs(exact.astype(int) - rounded.astype(int)).mean() <= 2


class Undecorated:
    """What a sampler looks like before its decorator."""

    init = step = print


@pytest.mark.parametrize(
    "asked, word",
    [
        (dict(height=500), "height must be a multiple of 8, got 500: try 496 or 504"),
        (dict(steps=0), "steps must be a whole number from 1 to 1000"),
        (dict(steps=1001), "steps"),
        (dict(seeds=-1), "seeds must be a whole number from 0 to 2\\*\\*64 - 1"),
        (dict(seeds=2**64), "seeds"),
        (dict(seeds=[1, 2, 3]), "prompts has 2 entries where seeds has 3"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be finite"),
        (dict(sampler="eulr"), "sampler must be one of"),
        (dict(spacing="karas"), "spacing must be one of"),
        (dict(guidance="agp"), "guidance must be one of cfg, rescale"),
        (dict(guidance="cfg_plus_plus", guidance_scale=7.5), "guidance_scale must be from 0 to 1"),
        (dict(guidance="apg", sampler="euler_cfg_pp"), "euler_cfg_pp is euler under CFG\\+\\+"),
        (dict(output="png"), "output must be"),
        (dict(clip_skip=4), "clip_skip must be a whole number from 0 to 3"),
        (dict(clip_skip=-1), "clip_skip"),
        (dict(sampler=sdjax.Euler), "pass Euler\\(\\)"),
        (dict(sampler=Undecorated()), "@sdjax.pytree"),
        (dict(noise=np.random.default_rng), "noise must be keys"),
        (dict(noise=np.zeros((2, 2), np.uint32)), "noise must be keys"),
        (dict(latents=np.zeros((2, 4, 8, 8), np.float32)), "latents must be"),
        (dict(latents=np.full((2, 8, 8, 4), np.nan)), "latents must be finite"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_sentence(sd1, asked, word):
    with pytest.raises(sdjax.InputError, match=word):
        sdjax.text_to_image(*sd1, ["a", "b"], **asked)


def test_no_prompts_are_refused(sd1):
    with pytest.raises(sdjax.InputError, match="prompts"):
        sdjax.text_to_image(*sd1, [])


@pytest.mark.parametrize("name, value", [("steps", 2.5), ("seeds", True), ("guidance_scale", "7")])
def test_a_setting_of_the_wrong_kind_is_refused(sd1, name, value):
    asked = dict(negative_prompts=None, seeds=0, steps=1, guidance_scale=1.0) | {name: value}
    with pytest.raises(sdjax.InputError, match=name):
        settings.resolve(sd1[0], "a", **asked, height=None, width=None, latents=None)
