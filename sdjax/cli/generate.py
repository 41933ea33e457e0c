"""`sdjax generate`: prompts to PNGs."""

import argparse
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdjax import bundled, images
from sdjax.checkpoints.finding import Source, find
from sdjax.cli import request
from sdjax.cli.request import Request
from sdjax.cli.show import Interrupted, Progress, note, printable, say, waiting
from sdjax.errors import InputError

if TYPE_CHECKING:
    from sdjax.model import FrozenConfig, Model

_PAGE = 48  # images on one contact sheet


class Job(NamedTuple):
    """One image."""

    prompt: str
    seed: int


def run(asked: argparse.Namespace) -> None:
    """Check, load, and save every image as soon as its batch is made."""
    wanted = request.read(asked)
    if asked.model is None and asked.source is None:
        note(f"{bundled.NAME} is {bundled.ABOUT}: for a real checkpoint add --model PATH")
    options: dict[str, Any] = dict(config=wanted.config, ema=wanted.ema, variant=wanted.variant)
    source = find(wanted.model, **options)
    if "unet" not in source.networks:
        raise InputError(f"{wanted.model} holds no UNet: give a whole checkpoint")
    from sdjax import parallel
    from sdjax.checkpoints import digest
    from sdjax.checkpoints.loading import assemble, read
    from sdjax.checkpoints.tensors import floating
    from sdjax.cli import loras

    if source.note:
        note(source.note)
    model = assemble(source)
    wanted = completed(wanted, model, source)
    updates = loras.load(wanted.loras, model)
    warn_of_cuts(wanted, source)
    settings = common_settings(wanted, model)
    settings["loras"] = [update.settings for update in updates]
    files = [tensor.path for part in source.networks.values() for tensor in part.tensors.values()]
    files = list(dict.fromkeys(files))
    with waiting(f"hashing {sum(os.path.getsize(path) for path in files) / 1e9:.2f} GB"):
        settings["model_hash"] = digest.of_files(files)
    if wanted.repeats:
        check_weights(wanted, model, settings["model_hash"])
    keep_programs(asked)
    progress = Progress()
    saved: list[Path] = []
    try:
        dtype = floating(wanted.dtype) if wanted.dtype else None
        # Once: a call with params on one device copies them to all others again.
        params = loras.merged(read(source, dtype, progress.loading), updates)
        params = parallel.replicate(params)
        del source, updates
        for job, pixels in made(wanted, model, params, progress):
            own = settings | {"prompt": job.prompt, "seed": job.seed}
            stem = wanted.stem or images.safe_name(job.prompt, job.seed)
            saved.append(images.save(wanted.folder, stem, pixels, own))
            say(str(saved[-1]))
    except KeyboardInterrupt:
        where = f" in {wanted.folder}" if saved else ""
        raise Interrupted(f"{len(saved)} of {_total(wanted)} images were saved{where}") from None
    finally:
        progress.close()
    if len(saved) > 1:
        write_sheets(wanted, saved)


def keep_programs(asked: argparse.Namespace) -> None:
    """Turn jax's persistent compilation cache on, wherever it can be written."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if asked.no_cache:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = asked.cache_dir or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        from sdjax.checkpoints.digest import home

        folder = str(home() / "xla")
    if "://" not in folder:  # a bucket is jax's affair
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
        except OSError as error:
            if asked.cache_dir:
                raise InputError(f"no cache can be kept in {folder}: {error.strerror}") from None
            return
        if not os.access(folder, os.W_OK):
            return
    jax.config.update("jax_compilation_cache_dir", folder)
    # By default jax keeps nothing that took under a second; here each program counts.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    compilation_cache.reset_cache()  # it decides once, before the first program


def completed(wanted: Request, model: "Model", source: Source) -> Request:
    """The request with the model's and the device's choices filled in, and what they refuse."""
    import jax

    from sdjax.diffusion.methods import METHODS
    from sdjax.parallel import device_count
    from sdjax.tasks.settings import check_limits, check_model, side

    check_model(model)
    cpu = jax.default_backend() == "cpu"
    rows, columns = model.size
    height = side(model.vae.factor, "height", wanted.height or rows)
    width = side(model.vae.factor, "width", wanted.width or columns)
    method = METHODS[wanted.method or "cfg"]
    advised = getattr(method, "advised_scale", model.guidance_scale)
    guidance = advised if wanted.guidance is None else wanted.guidance
    check_limits(method, [guidance])
    return wanted._replace(
        height=height,
        width=width,
        steps=wanted.steps or model.steps,
        guidance=guidance,
        dtype=wanted.dtype or default_dtype(source, cpu or bundled.is_meant(wanted.model)),
        batch=wanted.batch or min(device_count() * (1 if cpu else 4), _total(wanted)),
    )


def default_dtype(source: Source, wide: bool) -> str | None:
    """The dtype where none is asked for, `wide` (on a CPU, or small) in float32; None is as stored.

    Networks compute in float32 unless the weights are bfloat16, so float16 as stored would take the
    time and memory of float32.
    """
    if wide:
        return "float32"
    stored = {tensor.dtype.name for tensor in source.networks["unet"].tensors.values()}
    if "float16" not in stored:
        return None
    note("the weights are float16, too narrow to compute in: bfloat16 is used (see --dtype)")
    return "bfloat16"


def warn_of_cuts(wanted: Request, source: Source) -> None:
    """Say which words a tokenizer has no room for."""
    texts = dict.fromkeys([*wanted.prompts, wanted.negative or ""])
    cuts: dict[str, tuple[str, int]] = {}
    for tokenizer in source.tokenizers.values():
        for text, cut in zip(texts, tokenizer(list(texts)).dropped, strict=True):
            if cut and len(cut) > len(cuts.get(text, ("", 0))[0]):
                cuts[text] = cut, tokenizer.length
    for text, (cut, length) in cuts.items():
        note(
            f"warning: {printable(text)[:40]!r}... is over {length} tokens; cut: {printable(cut)!r}"
        )


def check_weights(wanted: Request, model: "Model", found: str) -> None:
    """Refuse to repeat an image with other weights, unless the user insists."""
    old = wanted.repeats or {}
    made_with = old.get("model_hash")
    if made_with != found:
        what = (
            f"the weights of {wanted.model} ({found[:10]}) are not the image's ({made_with!s:.10})"
        )
    elif old.get("scheduler", told(model.scheduler)) != told(model.scheduler):
        what = f"the scheduler's config in {wanted.model} is not the image's"
    else:
        return
    if not wanted.insists:
        raise InputError(f"{what}: give --model to make it with them all the same")
    note(f"warning: {what}")


def common_settings(wanted: Request, model: "Model") -> dict[str, Any]:
    """What every image's PNG says."""
    from sdjax import __version__
    from sdjax.diffusion import profiles, torch_noise
    from sdjax.tasks.plan import choose

    assert wanted.steps  # `completed`
    plan = choose(model, wanted.steps, wanted.sampler, wanted.spacing)
    if plan.note:
        note(plan.note)
    if wanted.noise:
        torch_noise.per_step(wanted.noise, plan.sampler)
    names = {kind: name for name, kind in profiles.SAMPLERS.items()}
    # Its name says more than its place, which is another one on other machines.
    where = bundled.NAME if bundled.is_meant(wanted.model) else wanted.model
    here, config = os.path.exists(where) and not bundled.is_named(where), wanted.config
    return {
        "version": __version__,
        "negative_prompt": wanted.negative,
        "steps": wanted.steps,
        "sampler": wanted.sampler,
        "sampler_name": names.get(type(plan.sampler)),
        "spacing": wanted.spacing,
        "noise": wanted.noise,
        "guidance_scale": wanted.guidance,
        "guidance_method": wanted.method,
        "height": wanted.height,
        "width": wanted.width,
        "dtype": wanted.dtype,
        "batch": wanted.batch,
        "model": request.from_home(where) if here else where,
        "model_name": Path(where).stem if here else where,
        "config": request.from_home(config) if config and os.path.exists(config) else config,
        "ema": wanted.ema,
        "variant": wanted.variant,
        "scheduler": told(model.scheduler),
    }


def told(config: "FrozenConfig") -> dict[str, Any]:
    """A config as an image tells it: JSON has no -Infinity, which diffusers writes all the same, so
    that such a number is a string.
    """
    return json.loads(config.json, parse_constant=str)


def made(
    wanted: Request, model: "Model", params: Any, progress: Progress
) -> Iterator[tuple[Job, Any]]:
    """Every image, batch by batch. The last batch is filled up, so that all are one program."""
    from sdjax.tasks.text_to_image import text_to_image

    jobs = [Job(prompt, seed) for prompt in wanted.prompts for seed in wanted.seeds]
    assert wanted.steps and wanted.guidance is not None  # `completed`
    size = wanted.batch or 1
    for start in range(0, len(jobs), size):
        some = jobs[start : start + size]
        rows = some + some[-1:] * (size - len(some))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it says again what was said before
            pixels = text_to_image(
                model,
                params,
                [job.prompt for job in rows],
                negative_prompts=wanted.negative,
                seeds=[job.seed for job in rows],
                steps=wanted.steps,
                sampler=wanted.sampler,
                spacing=wanted.spacing,
                guidance_scale=wanted.guidance,
                guidance=wanted.method,
                height=wanted.height,
                width=wanted.width,
                progress=progress.running,
                **foreign_noise(wanted, model, [job.seed for job in rows]),
            )
        yield from zip(some, pixels, strict=False)


def foreign_noise(wanted: Request, model: "Model", seeds: list[int]) -> dict[str, Any]:
    """The start, and the noise of every step, that another program would draw from these seeds."""
    if wanted.noise is None:
        return {}
    from sdjax.diffusion import torch_noise
    from sdjax.tasks.plan import choose
    from sdjax.tasks.settings import latent_shape

    assert wanted.height and wanted.width and wanted.steps  # `completed`
    shape = latent_shape(model, wanted.height, wanted.width)
    plan = choose(model, wanted.steps, wanted.sampler, wanted.spacing)
    start, later = torch_noise.record(wanted.noise, seeds, shape, plan)
    return {"latents": start, "noise": later}


def write_sheets(wanted: Request, saved: list[Path]) -> None:
    """Contact sheets of what was saved, 48 images on each."""
    jobs = [(prompt, seed) for prompt in wanted.prompts for seed in wanted.seeds]
    one = len(wanted.prompts) == 1
    for start in range(0, len(saved), _PAGE):
        page = slice(start, start + _PAGE)
        pictures = [images.read(path) for path in saved[page]]
        captions = [f"{seed}" if one else f"{seed} · {prompt}" for prompt, seed in jobs[page]]
        sheet = images.contact_sheet(pictures, captions)
        say(str(images.save(wanted.folder, "contact-sheet", sheet)))


def _total(wanted: Request) -> int:
    return len(wanted.prompts) * len(wanted.seeds)
