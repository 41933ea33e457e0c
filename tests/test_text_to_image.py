"""Whole pictures against torch diffusers: from prompts to uint8, every family."""

import numpy as np
import pytest
from peers import nchw, nhwc, relative_error, save_tiny_pipeline

import sdjax

PROMPTS = ["a red house by the sea at night", "two boats"]
NEGATIVES = ["blurry", ""]
STEPS = 10


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder and torch pipeline of a family, written once."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, save_tiny_pipeline(folder, family)
        return made[family]

    return make


def unit_noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def assert_same_pictures(ours, theirs):
    """Equal uint8 but for one level in at most 0.1% of places."""
    gap = np.abs(ours.astype(int) - theirs.astype(int))
    assert gap.max() <= 1
    assert (gap > 0).mean() <= 1e-3


def torch_pictures(pipeline, latents):
    import torch

    with torch.no_grad():
        scaled = nchw(latents) / pipeline.vae.config.scaling_factor
        pixels = nhwc(pipeline.vae.decode(scaled).sample)
    return (np.clip(pixels / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)


def ddim(pipeline):
    """The peer's PNDM replaced as `sdjax` replaces it."""
    import diffusers

    if isinstance(pipeline.scheduler, diffusers.PNDMScheduler):
        pipeline.scheduler = diffusers.DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False
        )
    return pipeline


@pytest.mark.parametrize("family", ["sd1", "sd2-base", "sd2", "sdxl"])
def test_ten_guided_steps_equal_diffusers(tiny, family):
    folder, pipeline = tiny(family)
    noise = unit_noise((2, 8, 8, 4))
    settings = dict(negative_prompts=NEGATIVES, steps=STEPS, guidance_scale=7.5, latents=noise)
    model, params = sdjax.load(folder)
    latents = sdjax.text_to_image(
        model, params, PROMPTS, height=64, width=64, output="latents", **settings
    )
    theirs = nhwc(
        ddim(pipeline)(
            PROMPTS,
            negative_prompt=NEGATIVES,
            num_inference_steps=STEPS,
            guidance_scale=7.5,
            latents=nchw(noise),
            output_type="latent",
        ).images
    )
    assert relative_error(latents, theirs) <= 1e-4
    images = sdjax.text_to_image(model, params, PROMPTS, height=64, width=64, **settings)
    assert images.dtype == np.uint8 and images.shape == (2, 64, 64, 3)
    assert_same_pictures(images, torch_pictures(pipeline, theirs))
