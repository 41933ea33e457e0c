"""`text_to_image`: prompts to pictures, every setting per image, in one program."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import parallel
from sdjax.diffusion import methods, names, sampling
from sdjax.diffusion.noise import Tape, keys, start
from sdjax.diffusion.plan import Plan, batch, bounded
from sdjax.errors import InputError
from sdjax.model import Model, Params, compute_dtype, decode, denoiser, encode_text, project
from sdjax.tasks import settings
from sdjax.tasks.plan import choose
from sdjax.types import Array, Denoiser, Latents, Sampler, leaves32

Progress = Callable[[str, int, int], None]
"""Called with a stage ("compile", "steps", "decode"), how much of it is done, and of how much."""


def text_to_image(
    model: Model,
    params: Params,
    prompts: str | Sequence[str],
    *,
    negative_prompts: str | Sequence[str | None] | None = None,
    seeds: int | Sequence[int] | Array = 0,
    steps: int | Sequence[int] | Array | None = None,
    sampler: str | Sampler | Plan | Any = None,
    spacing: str | None = None,
    guidance_scale: float | int | Sequence[float | int] | Array | None = None,
    guidance: str | methods.Method | None = None,
    height: int | None = None,
    width: int | None = None,
    latents: Any = None,
    noise: Any = None,
    clip_skip: int = 0,
    progress: bool | Progress = False,
    output: str = "images",
) -> np.ndarray:
    """Images [b, height, width, 3] uint8, one for each prompt, seed or other per-image setting.

    Rombach et al. 2022 (arXiv:2112.10752), section 3.3, with classifier-free guidance (Ho and
    Salimans 2022, arXiv:2207.12598) or what came after it. Prompts, negative prompts, seeds, steps
    and guidance scales are one value for all images or a sequence of one per image. Image i depends
    on its own settings alone, not on the batch around it or on the devices that it is split over.

    Args:
        seeds: integers from 0 to 2**64 - 1.
        steps: 1 to 1000, or as many noise levels as the model's spacing has. Unequal counts share
            one program as long as the longest. None is what the model's makers advise, else 20.
        sampler: a name in `profiles.SAMPLERS` or `names.CFG_PLUS_PLUS` (which is guidance too), or
            any `Sampler`; None is the model's own. Or a `Plan` of another program's
            (`profiles.a1111(model.schedule, "DPM++ 2M")`), whose own steps stand for `steps`.
        spacing: a name in `profiles.SPACINGS`; None is the model's own.
        guidance_scale: w in x0_negative + w * (x0_prompt - x0_negative). If it is 1 for all
            images, a second program runs with one network evaluation instead of two. None is what
            the model's makers advise, else 7.5; with CFG++ 0.6.
        guidance: another way to use these two estimates: a name in `methods.METHODS` (cfg, rescale,
            apg, cfg_zero, tcfg, cfg_plus_plus, interval, perp_neg), or a function (denoise,
            guidance_scale) -> denoise such as `Partial(projection.apg, norm=10.0)`,
            `Partial(methods.limited, high=3.0)` or one's own; `methods` says more. New numbers in
            it never recompile. Autoguidance by a second model and several prompts an image
            (`guidance.composed`) are put together by hand.
        height, width: pixels, multiples of 8; None is what the model was trained at.
        latents: the starting noise, [b, h, w, c] of unit variance, instead of the seeds' own.
        noise: the stochastic samplers' noise, instead of the seeds' own: keys [b], or a `Noise`
            whose leaves count images along axis `noise.image_axis` (0 without that attribute).
            From seeds and keys it is white, or of one Brownian path an image for the samplers that
            k-diffusion gives one, DPM-Solver++'s SDE forms (`sampling.noise_of`).
        clip_skip: text encoder layers to leave out at the end, for the prompts only.
        progress: True draws bars; or a function that is told of every step.
        output: "latents" stops before the decoder: [b, h, w, c] float32 as the VAE scaled them.

    Raises:
        InputError: a setting is out of range, or sequences differ in length; nothing has run.
    """
    sampler, guidance = names.apart(sampler, guidance)
    method = methods.prepared(guidance, model.schedule.prediction)
    advised = getattr(method, "advised_scale", model.guidance_scale)
    asked = settings.resolve(
        model,
        prompts,
        negative_prompts,
        seeds,
        model.steps if steps is None else steps,
        advised if guidance_scale is None else guidance_scale,
        height,
        width,
        latents,
        clip_skip,
    )
    if output not in ("images", "latents"):
        raise InputError(f'output must be "images" or "latents", got {output!r}')
    settings.check_limits(method, asked.guidance_scales)
    size = len(asked.prompts)
    plans = {n: choose(model, n, sampler, spacing) for n in set(asked.steps)}
    chosen = batch([plans[n] for n in asked.steps])
    if chosen.note:
        warnings.warn(chosen.note, stacklevel=2)
    longest = len(chosen.timesteps)  # a few spacings have more or fewer steps than asked for
    unguided = methods.is_cfg(method) and all(scale == 1 for scale in asked.guidance_scales)
    sides = 1 if unguided else getattr(method, "sides", 2)
    shape = settings.latent_shape(model, asked.height, asked.width)
    method = method.suited(chosen.sampler) if hasattr(method, "suited") else method
    sampler = method.around(chosen.sampler) if hasattr(method, "around") else chosen.sampler
    solver = parallel.Parts.of(leaves32(sampler), functools.partial(_image_axis, size))
    guide = parallel.Parts.of(leaves32(method), functools.partial(_image_axis, size))
    draws = parallel.Parts.of(*_checked(sampler, noise, longest, (size, *shape)))

    words = _words(asked.seeds)
    # Everything per image leads with the image: that axis is split over the devices.
    first = {
        "tokens": settings.tokens(model, asked, sides),
        "keys": words,
        "latents": asked.latents,
        "scale": np.float32(chosen.init_scale),
    }
    every = {
        "sigmas": np.asarray(chosen.sigmas, np.float32).swapaxes(0, 1),
        "timesteps": np.asarray(chosen.timesteps, np.float32).swapaxes(0, 1),
        "guidance_scale": np.asarray(asked.guidance_scales, np.float32).reshape(-1, 1, 1, 1),
        "keys": words,
        "sampler": solver.each,
        "guidance": guide.each,
        "noise": draws.each,
    }
    first, every, last = parallel.split((first, every, np.float32(chosen.final_scale)), size)
    params = parallel.replicate(params)
    report = _reporter(progress)

    report("compile", 0, 1)
    x, conditions = _prepare((model, sides, clip_skip, shape), params, first)
    count = 1 if progress else longest
    carry = _begin(solver.outline, solver.shared, x, every["sampler"])
    bounds = chosen.clip, chosen.threshold
    outlines = solver.outline, guide.outline, draws.outline
    static = (model, sides, count, bounds, outlines)
    for index in range(0, longest, count):
        shared = (params["unet"], solver.shared, guide.shared, draws.shared, np.int32(index))
        carry = _advance(static, shared, carry, conditions, every)
        if progress:  # programs are queued: without this, all steps are done at once
            jax.block_until_ready(carry)
        if index == 0:
            report("compile", 1, 1)
        report("steps", index + count, longest)
    report("decode", 0, 1)
    result, finite = parallel.join(_finish((model, output), params["vae"], carry, last), size)
    report("decode", 1, 1)
    if not finite.all():
        warnings.warn(
            f"images {np.flatnonzero(~finite).tolist()} hold NaN or infinity, and are black there: "
            "try other weights, a lower guidance_scale, or dtype float32",
            RuntimeWarning,  # the command silences UserWarnings that it has said itself
            stacklevel=2,
        )
    return result


_PARTS = ("sampler", "guidance", "noise")
"""What is taken apart into leaves that are shared and leaves that are one an image."""


def _prepare_one(static: Any, params: Params, first: dict[str, Any]) -> tuple[Latents, dict]:
    """Everything before the first step: the noisy start, and what the networks are told."""
    model, _, clip_skip, shape = static
    n = first["scale"].shape[0]
    latents = first["latents"]
    if latents is None:
        latents = start(_keys(first["keys"]), shape)
    tokens = first["tokens"]
    rows = {k: _rows(v) for k, v in tokens.items()}
    context, pooled = encode_text(model, params, rows.get("ids"), rows.get("ids_2"))
    if clip_skip:  # as diffusers has it: the prompt skips layers, the negative prompt does not
        ids, ids_2 = (None if v is None else v[-n:] for v in (rows.get("ids"), rows.get("ids_2")))
        skipped = encode_text(model, params, ids, ids_2, clip_skip=clip_skip)
        context = jnp.concatenate([context[:-n], skipped.context])
    if "absent" in rows:  # the negative of SDXL base that is zeros instead of the empty prompt
        keep = 1 - rows["absent"][:, None]
        context, pooled = context * keep[..., None], pooled * keep
    conditions = {"context": project(model, params, context), "pooled": pooled}
    conditions["time_ids"] = rows.get("time_ids")
    conditions["concat"] = _blank(model, params, n, shape)
    return latents * first["scale"], conditions


def _begin_one(outline: Any, shared: Any, x: Latents, each: Any) -> sampling.Carry:
    return sampling.begin(parallel.Parts(outline, shared, each).whole(), x)


def _advance_one(
    static: Any, shared: Any, carry: sampling.Carry, conditions: dict, every: dict[str, Any]
) -> sampling.Carry:
    """`count` steps from `index` on: the program that all the time is spent in."""
    model, sides, count, bounds, outlines = static
    unet, *whole, index = shared
    sampler, method, noise = (
        parallel.Parts(outline, leaves, every[name]).whole()
        for outline, leaves, name in zip(outlines, whole, _PARTS, strict=True)
    )
    n = carry.x.shape[0]
    if noise is None:
        noise = sampling.noise_of(sampler, _keys(every["keys"]), carry.x.shape[1:])
    sigmas, timesteps = (every[name].swapaxes(0, 1) for name in ("sigmas", "timesteps"))

    def network(k: int) -> Denoiser:
        """The last k sides: all of them, or the prompts alone."""
        told = {name: jax.tree.map(lambda a: a[-k * n :], v) for name, v in conditions.items()}
        concat, tile = conditions["concat"], (1, k, 1, 1, 1)  # the same for all sides
        return denoiser(
            model,
            {"unet": unet},
            told["context"],
            pooled=told["pooled"],
            time_ids=told["time_ids"],
            concat=None if concat is None else jnp.concatenate([concat] * k),
            timesteps=(jnp.tile(sigmas, tile), jnp.tile(timesteps, tile)),
        )

    denoise = network(1)
    if sides > 1:
        every_side = methods.Sides(network(sides), denoise, sigmas)
        denoise = methods.restored(method)(every_side, every["guidance_scale"])
    denoise = bounded(denoise, *bounds)
    return sampling.scan(sampler, denoise, carry, sigmas, noise, index, count)


def _finish_one(static: Any, vae: Params, carry: sampling.Carry, scale: Any) -> Any:
    model, output = static
    latents = carry.x * scale
    if output == "latents":
        return latents, _finite(latents)
    pixels = decode(model, {"vae": vae}, latents)
    finite = jnp.isfinite(pixels)
    return jnp.round(jnp.where(finite, pixels, 0) * 255).astype(jnp.uint8), _finite(pixels)


def _finite(x: Latents) -> Any:
    return jnp.isfinite(x).all(axis=(1, 2, 3))


_prepare = parallel.mapped(_prepare_one)
_begin = parallel.mapped(_begin_one)
_advance = parallel.mapped(_advance_one, donate=(0,))
_finish = parallel.mapped(_finish_one)


def _blank(model: Model, params: Params, n: int, shape: tuple[int, int, int]) -> Any:
    """What an inpainting network sees where nothing is kept: a full mask, a grey picture."""
    extra = model.unet.in_channels - model.vae.latent_channels
    if not extra:
        return None
    height, width, _ = shape
    factor = model.vae.factor
    grey = jnp.zeros((1, height * factor, width * factor, 3), compute_dtype(params["vae"]))
    mean, _ = model.vae.apply({"params": params["vae"]}, grey, method="encode")
    blank = (mean.astype(jnp.float32) - (model.vae.shift_factor or 0)) * model.vae.scaling_factor
    mask = jnp.ones((1, height, width, 1))
    return jnp.repeat(jnp.concatenate([mask, blank], axis=-1), n, axis=0)


def _image_axis(size: int, leaf: Any) -> int | None:
    """Numbers of samplers and guidance are one an image as [b, 1, 1, 1] or [n, b, 1, 1, 1], else
    shared by all.
    """
    shape = np.shape(leaf)
    axis = len(shape) - 4
    return axis if axis in (0, 1) and shape[axis:] == (size, 1, 1, 1) else None


def _checked(
    sampler: Sampler, noise: Any, steps: int, shape: tuple
) -> tuple[Any, Callable[[Any], int | None]]:
    """The caller's noise, and which axis of its leaves counts images."""
    if noise is None:
        return None, lambda leaf: None
    if parallel.is_key(noise):  # [b], as `sample` takes them
        noise = sampling.noise_of(sampler, noise, shape[1:])
    if isinstance(noise, Tape):
        noise.check(steps, shape)
    if not callable(noise) or any(leaf is noise for leaf in jax.tree.leaves(noise)):
        raise InputError(
            f"noise must be keys [b], or a Noise that is a pytree, got {type(noise).__name__}: "
            "decorate the class with @sdjax.pytree"
        )
    at = getattr(noise, "image_axis", 0)

    def axis(leaf: Any) -> int | None:
        return at if np.ndim(leaf) > at and np.shape(leaf)[at] == shape[0] else None

    return noise, axis


def _rows(pairs: Any) -> Any:
    """[n, k, ...] (negative, positive) -> [k n, ...], negatives first: one true batch."""
    return pairs.swapaxes(0, 1).reshape(-1, *pairs.shape[2:])


def _words(seeds: Sequence[int]) -> np.ndarray:
    """Keys as the plain integers that can be split over devices."""
    return np.asarray(jax.random.key_data(keys(seeds)))


def _keys(words: Any) -> Any:
    return jax.random.wrap_key_data(words, impl="threefry2x32")


def _reporter(progress: bool | Progress) -> Progress:
    if callable(progress):
        return progress
    if not progress:
        return lambda stage, done, total: None
    from tqdm import tqdm

    bar = tqdm(total=None, desc="compile", leave=False)

    def draw(stage: str, done: int, total: int) -> None:
        if (bar.desc.rstrip(": "), bar.total) != (stage, total):
            bar.reset(total)
            bar.set_description(stage)
        bar.update(done - bar.n)
        if stage == "decode" and done == total:
            bar.close()

    return draw
