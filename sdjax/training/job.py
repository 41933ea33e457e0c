"""From settings to what a loop runs: a stage, first weights, data, pictures, and what is saved."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sdjax import bundled, config, parallel
from sdjax.checkpoints import fitting, save
from sdjax.checkpoints.autoencoder import load_autoencoder, save_vae
from sdjax.checkpoints.finding import family
from sdjax.checkpoints.folder import TOKENIZERS
from sdjax.checkpoints.loading import CLASSES, advised, load, load_vae
from sdjax.checkpoints.lora import save_lora
from sdjax.checkpoints.lpips import load_lpips
from sdjax.diffusion.schedules import Schedule
from sdjax.errors import InputError
from sdjax.images import contact_sheet
from sdjax.model import FrozenConfig, Model, Params
from sdjax.models.clip import CLIPTextModel
from sdjax.models.discriminator import Discriminator
from sdjax.models.vae import AutoencoderKL
from sdjax.models.vq import VQModel
from sdjax.tasks.text_to_image import text_to_image
from sdjax.text import Tokenizer
from sdjax.training import data, encoding, feeding
from sdjax.training.data import Batches, Source
from sdjax.training.first_stage import FirstStage, FirstStageLoss, measure_scale, split
from sdjax.training.fresh import fresh
from sdjax.training.lora import Lora
from sdjax.training.losses import DiffusionLoss
from sdjax.training.scenes import labels, measure
from sdjax.training.scenes.hearing import Hearing
from sdjax.training.scenes.reading import Reading
from sdjax.training.second_stage import SecondStage
from sdjax.training.settings import Run
from sdjax.training.vocabulary import learn

Note = Callable[[str], None]


class Job(NamedTuple):
    """A run, ready to go."""

    stage: Any
    params: Params | None
    """What training starts from; None draws it."""
    frozen: Params
    batches: Batches
    picture: Callable[[Params, Any], np.ndarray | None]
    """A sheet of samples from params and `extra`: uint8 [h, w, 3]."""
    save: Callable[[Path, Params, Any, bool], Path]
    """Write what was learnt, from params and `extra`, into a folder; True if they are averages."""


def job(run: Run, note: Note, process: tuple[int, int] = (0, 1)) -> Job:
    """Load and build all that the settings name.

    InputError: what cannot be loaded, or does not fit together.
    """
    if run.kind == "first_stage":
        return first(run, process)
    if run.kind == "second_stage":
        return second(run, note, process)
    return text(run, process) if run.kind == "scenes_text" else reader(run, process)


def first(run: Run, process: tuple[int, int]) -> Job:
    """An autoencoder's training."""
    module, params = _autoencoder(run)
    lpips, frozen = None, {}
    if run.loss.lpips:
        lpips, frozen["lpips"] = load_lpips(*run.loss.lpips)
    loss = FirstStageLoss(
        pixel_loss=run.loss.pixel,
        kl_weight=run.loss.kl_weight,
        perceptual_weight=run.loss.perceptual_weight,
        disc_start=run.loss.disc_start,
        disc_weight=run.loss.disc_weight,
        disc_factor=run.loss.disc_factor,
        disc_loss=run.loss.disc_loss,
        codebook_weight=run.loss.codebook_weight,
        beta=run.loss.codebook_beta,
        legacy=run.loss.codebook_legacy,
        ema_decay=run.loss.codebook_decay,
        learn_logvar=run.loss.learn_logvar,
        reduction=run.loss.reduction,
    )
    stage = FirstStage(
        vae=module,
        discriminator=Discriminator() if run.loss.discriminator else None,
        lpips=lpips,
        loss=loss,
        dtype=run.model.dtype,
        remat=run.model.remat,
    )
    alone = run.model.train == ("decoder",)
    if params is not None:
        drawn, _ = stage.init(jax.random.key(run.run.seed))
        if alone:
            params, frozen["vae"] = split(params)
        params = drawn | {"vae": params}
    kept = frozen.get("vae", {})

    def networks(params: Params) -> Params:
        return params | {"vae": {**kept, **params["vae"]}}

    source = feeding.source_of(run, captions=False)
    held = feeding.held_out(run, source, 8)
    reconstruct = jax.jit(stage.reconstruct)

    def picture(params: Params, extra: Any) -> np.ndarray:
        made = np.asarray(reconstruct(networks(params), extra, held))
        return contact_sheet([*held, *made], columns=len(held))

    def finish(folder: Path, params: Params, extra: Any, averaged: bool) -> Path:
        params, scale = networks(params), module.scaling_factor
        if not alone:
            batches = feeding.batches_of(run, source, {}, (0, 1))
            with batches:
                seen = [next(batches) for _ in range(max(1, 256 // run.run.batch_size))]
            scale = measure_scale(stage, params, seen, extra=extra)
        tree = stage.autoencoder(params, extra)
        where = folder / ("vae" if averaged else "vae-last")
        return save_vae(where, module, tree, scale, overwrite=True)

    return Job(stage, params, frozen, feeding.batches_of(run, source, {}, process), picture, finish)


def second(run: Run, note: Note, process: tuple[int, int]) -> Job:
    """A diffusion model's training."""
    model, params = _model(run)
    lora = None
    if run.lora is not None:
        lora = Lora(run.lora.rank, run.lora.alpha, run.lora.targets)
    loss = DiffusionLoss(
        kind=run.loss.kind,
        min_snr_gamma=run.loss.min_snr_gamma,
        offset_noise=run.loss.offset_noise,
        caption_dropout=run.loss.caption_dropout,
        timesteps=run.loss.timesteps,
        perturbation=run.loss.perturbation,
        huber_scale=run.loss.huber_scale,
    )
    trained = tuple(run.model.train)
    stage = SecondStage(model, trained, loss, run.model.dtype, run.model.remat, lora)
    kept = {name: tree for name, tree in params.items() if lora or name not in trained}
    start = None if lora else {name: params[name] for name in trained}

    opened = feeding.source_of(run)
    source: Source | data.Cached = opened
    words: dict[str, Tokenizer] = {}
    for name, key in (("tokenizer", "ids"), ("tokenizer_2", "ids_2")):
        if getattr(model, name) is not None:
            words[key] = getattr(model, name)
    frozen = kept
    if run.data.cache:
        texts = any(name.startswith("text_encoder") for name in trained)
        source = parallel.first_alone(
            lambda: feeding.cached(run, note, model, params, opened, words, not texts)
        )
        frozen = {name: tree for name, tree in kept.items() if name != "vae"}
        if not texts:
            frozen = {n: t for n, t in frozen.items() if not n.startswith("text_encoder")}
            frozen["empty"] = encoding.empty(model, params)

    prompts = run.samples.prompts
    if run.run.sample_every and not prompts:
        prompts = feeding.captions(opened, 4)
        if not prompts:
            note("no samples are drawn: the data have no captions, and samples.prompts is not set")

    def networks(trained: Params) -> Params:
        return stage.networks(trained, kept)

    def picture(trained: Params, extra: Any) -> np.ndarray | None:
        if not prompts:
            return None
        images = text_to_image(
            model,
            networks(trained),
            prompts,
            seeds=[run.samples.seed + n for n in range(len(prompts))],
            steps=run.samples.steps,
            guidance_scale=run.samples.guidance_scale,
            sampler=run.samples.sampler,
            height=run.data.height,
            width=run.data.width,
        )
        return contact_sheet(list(images), prompts)

    def finish(folder: Path, trained: Params, extra: Any, averaged: bool) -> Path:
        if lora:
            where = folder / ("lora" if averaged else "lora-last")
            where.mkdir(exist_ok=True)
            return save_lora(where, model, trained, lora.scale)
        where = folder / ("model" if averaged else "model-last")
        return save(where, model, networks(trained), overwrite=True)

    batches = feeding.batches_of(run, source, words, process)
    return Job(stage, start, frozen, batches, picture, finish)


def text(run: Run, process: tuple[int, int]) -> Job:
    """A text encoder's training on captions; what is saved is a whole model, else untrained."""
    model, params = _model(run)
    if not isinstance(model.text_encoder, CLIPTextModel) or model.tokenizer is None:
        raise InputError("captions teach a text encoder without a projection: take such a config")
    make = functools.partial(labels.heard, model.tokenizer, run.data.seed)
    source = data.Drawn(make, run.data.count, f"captions of seed {run.data.seed}")

    def finish(folder: Path, trained: Params, extra: Any, averaged: bool) -> Path:
        where = folder / ("model" if averaged else "model-last")
        networks = params | {"text_encoder": trained["text_encoder"]}
        return save(where, model, networks, overwrite=True)

    stage = Hearing(model.text_encoder)
    return Job(stage, None, {}, feeding.batches_of(run, source, {}, process), _nothing, finish)


def reader(run: Run, process: tuple[int, int]) -> Job:
    """The training of the measure of how well pictures follow their prompts."""
    make = functools.partial(labels.seen, run.data.seed)
    source = data.Drawn(make, run.data.count, f"attributes of seed {run.data.seed}")

    def finish(folder: Path, trained: Params, extra: Any, averaged: bool) -> Path:
        where = folder / ("measure.safetensors" if averaged else "measure-last.safetensors")
        measure.save(trained["measure"], where)
        return where

    return Job(Reading(), None, {}, feeding.batches_of(run, source, {}, process), _nothing, finish)


def _nothing(params: Params, extra: Any) -> None:
    """No picture to show."""


def _autoencoder(run: Run) -> tuple[Any, Params | None]:
    """The module and, where it is loaded, its params."""
    if run.model.load:
        return _read_autoencoder(run.model.load)
    table = _tables(run).get("vae")
    if table is None:
        raise InputError(f"config {run.model.config} has no [vae], which is to be trained")
    if table.get("_class_name") == "VQModel":
        return VQModel.from_config(table), None
    return AutoencoderKL.from_config(table), None


def _read_autoencoder(where: str) -> tuple[Any, Params]:
    """One that was saved alone, or that of a whole checkpoint."""
    path = bundled.place(where)
    alone = (path / "config.json").is_file()
    return (load_autoencoder if alone else load_vae)(path, dtype="float32")


def _model(run: Run) -> tuple[Model, Params]:
    if run.model.load:
        model, params = load(run.model.load, dtype="float32")
    else:
        model, params = _fresh(run)
    if run.model.vae:
        vae, params["vae"] = _read_autoencoder(run.model.vae)
        if not isinstance(vae, AutoencoderKL):
            raise InputError(f"model.vae {run.model.vae} is a VQModel: a KL autoencoder is wanted")
        model = dataclasses.replace(model, vae=vae)
    whose = run.model.load or f"config {run.model.config}"
    fitting.check_latents(model.unet, model.vae, whose, "take parts of one model")
    return _rescheduled(run, model), params


def _rescheduled(run: Run, model: Model) -> Model:
    """The model with the prediction and the last noise level that the settings ask for."""
    scheduler = model.scheduler.dict()
    if run.loss.prediction is not None:
        scheduler["prediction_type"] = run.loss.prediction
    if run.loss.zero_snr is not None:
        scheduler["rescale_betas_zero_snr"] = run.loss.zero_snr
    if run.loss.zero_snr:
        # Lin et al. (2305.08891): sampling has to start at the last timestep; PNDM cannot.
        scheduler |= {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
        if scheduler.get("prediction_type", "epsilon") == "epsilon":
            raise InputError(
                "loss.zero_snr leaves an epsilon model nothing to learn at the last noise level: "
                'set loss.prediction to "v_prediction"'
            )
    if scheduler == model.scheduler.dict():
        return model
    return dataclasses.replace(
        model, scheduler=FrozenConfig.of(scheduler), schedule=Schedule.from_config(scheduler)
    )


def _fresh(run: Run) -> tuple[Model, Params]:
    """The networks of a config with new weights, its tokenizer and its schedule."""
    tables = _tables(run)
    modules = {n: CLASSES[n].from_config(tables[n]) for n in CLASSES if n in tables}
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        if name not in tables:
            raise InputError(f"config {run.model.config} has no [{name}]: a model needs one")
    written: dict[str, Any] = {"tokenizer": {}} | {n: tables[n] for n in TOKENIZERS if n in tables}
    tokenizers = {name: _tokenizer(table) for name, table in written.items()}
    fitting.check_text(modules, tokenizers, f"config {run.model.config}", "make them equal")
    model = Model(
        unet=modules["unet"],
        vae=modules["vae"],
        text_encoder=modules["text_encoder"],
        text_encoder_2=modules.get("text_encoder_2"),
        tokenizer=tokenizers["tokenizer"],
        tokenizer_2=tokenizers.get("tokenizer_2"),
        schedule=Schedule.from_config(tables["scheduler"]),
        scheduler=FrozenConfig.of(tables["scheduler"]),
        family=family(modules, tables["scheduler"]),
        **advised(tables.get("model_index", {}), run.model.config or ""),
    )
    key = jax.random.key(run.run.seed)
    params = {n: fresh(m, jax.random.fold_in(key, i)) for i, (n, m) in enumerate(modules.items())}
    return model, params


def _tables(run: Run) -> dict[str, dict[str, Any]]:
    assert run.model.config is not None
    return config.read(run.model.config)


def _tokenizer(table: dict[str, Any]) -> Tokenizer:
    """CLIP's own, that of a folder, or one that is learnt from the words of `scenes`."""
    vocabulary = table.get("vocabulary", "clip")
    if vocabulary == "clip":
        return Tokenizer.clip(table.get("pad_token", "<|endoftext|>"))
    if vocabulary == "scenes":
        from sdjax.training import scenes

        return learn(scenes.vocabulary(), table.get("model_max_length", 77))
    return Tokenizer.load(vocabulary)
