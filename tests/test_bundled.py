"""The model that comes with sdjax: an ordinary diffusers folder, and good at what it is for."""

import numpy as np
import pytest
from peers import (
    assert_same_pictures,
    nchw,
    nhwc,
    relative_error,
    torch_pictures,
    unit_noise,
)

import sdjax
from sdjax import bundled
from sdjax.training import scenes
from sdjax.training.feeding import HELD_OUT
from sdjax.training.first_stage import FirstStage
from sdjax.training.scenes.measure import score

PROMPTS = ["a red house by the sea at night", "two yellow balloons above snowy mountains at sunset"]


@pytest.fixture(scope="module")
def loaded():
    return sdjax.load(bundled.NAME, dtype="float32")


def test_it_is_whole_small_and_float16():
    report = sdjax.inspect(bundled.NAME)
    assert report.path == bundled.folder() and report.dtypes == ("float16",)
    assert {part.name for part in report.parts} == {"unet", "vae", "text_encoder"}
    files = [file for file in bundled.HOME.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert not any(file.is_symlink() for file in files)


def test_torch_makes_the_same_images_from_the_same_latents(loaded):
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(bundled.HOME, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    start = unit_noise((2, 16, 16, 4))
    asked = dict(num_inference_steps=20, guidance_scale=2.0)
    theirs = nhwc(pipeline(PROMPTS, latents=nchw(start), output_type="latent", **asked).images)
    ours = dict(latents=start, steps=20, guidance_scale=2.0)
    latents = sdjax.text_to_image(*loaded, PROMPTS, output="latents", **ours)
    assert relative_error(latents, theirs) <= 1e-4
    images = sdjax.text_to_image(*loaded, PROMPTS, **ours)
    assert_same_pictures(images, torch_pictures(pipeline, theirs))


def test_its_first_stage_keeps_28_decibels(loaded):
    model, params = loaded
    held = np.stack([scenes.draw(scenes.scene(HELD_OUT, n)) for n in range(20)])
    made = FirstStage(vae=model.vae).reconstruct({"vae": params["vae"]}, (), held)
    error = np.square(np.asarray(made, np.float64) - held).mean((1, 2, 3))
    assert np.mean(10 * np.log10(255**2 / error)) >= 28


def test_its_pictures_follow_their_prompts(loaded):
    """On the first 40 of the thousand prompts of its card."""
    world = [scenes.scene(HELD_OUT, n) for n in range(40)]
    prompts = [scenes.caption(scene, n) for n, scene in enumerate(world)]
    found = score(prompts, sdjax.text_to_image(*loaded, prompts, seeds=range(40)))
    assert found.share >= 0.85
