"""What the settings of a run must be together, and what of them a resumed run may change."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdjax import bundled, config
from sdjax.errors import InputError

if TYPE_CHECKING:
    from sdjax.training.schema import Run

MAY_CHANGE = frozenset(
    {
        "description",
        "run.out",
        "run.steps",
        "run.log_every",
        "run.sample_every",
        "run.save_every",
        "run.keep",
        "data.workers",
        "mesh.fsdp",
        "model.remat",
    }
)
"""Settings that the weights do not depend on, or that say how far to go; so all of [samples]."""


def completed(run: "Run") -> "Run":
    """The run with the defaults that depend on its kind."""
    train = {"first_stage": ("vae",), "second_stage": ("unet",), "scenes_text": ("text_encoder",)}
    if run.model.train or run.kind not in train:
        return run
    return replace(run, model=replace(run.model, train=train[run.kind]))


def check(run: "Run", origin: str) -> None:
    """Refuse what contradicts itself.

    InputError: the first contradiction, with the values of its keys and the mend.
    """
    for wrong, sentence in _contradictions(run):
        if wrong:
            raise InputError(f"{origin}: {sentence}")


def _contradictions(run: "Run") -> list[tuple[bool, str]]:
    go, model, data, optimizer, loss = run.run, run.model, run.data, run.optimizer, run.loss
    endless = data.source == ("scenes",)
    text_learns = sorted(name for name in model.train if name.startswith("text_encoder"))
    return _of_model(run) + [
        (
            optimizer.warmup > go.steps,
            f"optimizer.warmup ({optimizer.warmup}) is longer than run.steps ({go.steps}): "
            "the learning rate would never reach its peak",
        ),
        (
            go.batch_size % go.accumulate != 0,
            f"run.batch_size ({go.batch_size}) must be a multiple of run.accumulate "
            f"({go.accumulate}): try {-(-go.batch_size // go.accumulate) * go.accumulate}",
        ),
        (
            loss.min_snr_gamma is not None and loss.kind != "l2",
            f"loss.min_snr_gamma weighs the squared error and loss.kind is {loss.kind!r}: "
            'take one away, or set loss.kind to "l2"',
        ),
        (
            loss.zero_snr is True and loss.prediction == "epsilon",
            'loss.zero_snr leaves loss.prediction "epsilon" nothing to learn at the last level: '
            'take "v_prediction"',
        ),
        (
            loss.discriminator and loss.disc_start >= go.steps,
            f"loss.disc_start ({loss.disc_start}) is not before run.steps ({go.steps}): "
            "the discriminator would never count",
        ),
        (
            "scenes" in data.source and not endless,
            "data.source names scenes beside other sources: take one or the other",
        ),
        (not data.source, "data.source is an empty list: name a source"),
        (
            data.count is not None and not endless,
            "data.count is for scenes, which is endless; files are counted: take it away",
        ),
        (
            data.cache is not None and endless and data.count is None,
            "data.cache cannot hold scenes, which is endless: set data.count",
        ),
        (
            data.cache is not None and data.crop == "random",
            'data.cache holds one crop of an image: take data.crop "center", or no cache',
        ),
        (
            data.cache is not None and "vae" in model.train,
            "data.cache holds latents and model.train has the vae that makes them: take one away",
        ),
        (
            data.cache is not None and data.flip,
            "data.cache holds an image one way round: take data.flip away, or the cache",
        ),
        (
            run.lora is not None and not run.lora.targets,
            "lora.targets is an empty list: name the layers, such as to_q",
        ),
        (
            run.lora is not None and not set(model.train) <= {"unet", *text_learns},
            f"lora is for unet and text encoders and model.train has {', '.join(model.train)}: "
            "take [lora] away",
        ),
    ]


def _of_model(run: "Run") -> list[tuple[bool, str]]:
    model = run.model
    first, second = run.kind == "first_stage", run.kind == "second_stage"
    drawn = run.kind in ("scenes_text", "scenes_measure")
    own = ("text_encoder",) if run.kind == "scenes_text" else ()
    return [
        (
            drawn and run.data.source != ("scenes",),
            f"data.source of kind {run.kind!r} is scenes alone, which knows what its pictures show",
        ),
        (
            drawn and model.train != own,
            f"model.train of kind {run.kind!r} cannot be chosen: take it away",
        ),
        (
            run.kind == "scenes_measure" and model != type(model)(),
            "[model] is of no use to the measure, which has one shape: take it away",
        ),
        (
            run.lora is not None and not second,
            f"[lora] is for kind 'second_stage' and this run is {run.kind!r}: take it away",
        ),
        (
            model.config is None and model.load is None and run.kind != "scenes_measure",
            "model.config or model.load is missing: give a config for fresh weights, "
            "or a checkpoint to go on from",
        ),
        (
            model.config is not None and model.load is not None,
            f"model.config ({model.config}) and model.load ({model.load}) are both given: "
            "fresh weights or a checkpoint's, take one",
        ),
        (
            second and model.load is None and model.vae is None,
            "model.vae is missing: a second stage needs a trained first one",
        ),
        (
            run.lora is not None and model.load is None,
            "model.load is missing: lora trains updates of a checkpoint's weights",
        ),
        (
            first and model.train not in (("vae",), ("decoder",)),
            f"model.train of a first stage is vae or decoder, got {', '.join(model.train)}",
        ),
        (
            model.train == ("decoder",) and model.load is None,
            "model.load is missing: a decoder alone learns for the latents of a trained encoder",
        ),
        (
            model.train == ("decoder",) and run.loss.codebook_decay is not None,
            "loss.codebook_decay moves the codebook, and model.train has the decoder alone: take "
            "one away",
        ),
        (
            second and not {"vae", "decoder"}.isdisjoint(model.train),
            "model.train has vae or decoder, which are the first stage's: take it away",
        ),
    ]


def check_files(run: "Run") -> None:
    """Refuse configs, checkpoints and data that are not there; hub ids and patterns pass.

    InputError: the first that is missing, by its key.
    """
    model = run.model
    if model.config is not None and model.config not in config.names():
        if not (model.config.endswith(".toml") and os.path.isfile(model.config)):
            raise InputError(
                f"model.config {model.config!r} is neither a shipped config "
                f"({', '.join(config.names())}) nor a .toml file"
            )
    for key, path in (("model.load", model.load), ("model.vae", model.vae)):
        if bundled.is_named(path):
            bundled.folder()
        elif path is not None and not (os.path.lexists(path) or _may_be_hub_id(path)):
            raise InputError(f"{key}: there is no model at {path}")
    for path in run.loss.lpips:
        if not os.path.isfile(path):
            raise InputError(f"loss.lpips: there is no file {path}")
    for path in run.data.source:
        pattern = any(mark in path for mark in "*?[{")
        if path != "scenes" and not pattern and not os.path.lexists(path):
            raise InputError(f"data.source: there is nothing at {path}: give scenes, or a path")


def _may_be_hub_id(path: str) -> bool:
    """Whether it looks like org/name, and no folder here is called org."""
    parts = path.split("/")
    return len(parts) == 2 and all(p[:1].isalnum() for p in parts) and not os.path.isdir(parts[0])


def differences(saved: "Run | Mapping[str, Any]", run: "Run") -> list[str]:
    """The dotted keys in which two runs differ and which a resumed run may not change."""
    old, new = (_flat(side) for side in (saved, run))
    keys = dict.fromkeys([*old, *new])
    return [
        key
        for key in keys
        if old.get(key) != new.get(key) and key not in MAY_CHANGE and not key.startswith("samples.")
    ]


def check_resumed(saved: "Run | Mapping[str, Any]", run: "Run") -> None:
    """Refuse to go on with a run under settings that would make it another.

    InputError: the keys that differ, with both values.
    """
    changed = differences(saved, run)
    if not changed:
        return
    old, new = (_flat(side) for side in (saved, run))
    said = [f"{key} ({_value(old, key)}, now {_value(new, key)})" for key in changed[:6]]
    more = f" and {len(changed) - 6} more" if len(changed) > 6 else ""
    raise InputError(
        f"{run.run.out} holds a run with other settings: {', '.join(said)}{more}: "
        "set them back, or give run.out another folder"
    )


def _value(flat: Mapping[str, Any], key: str) -> str:
    return f"{flat[key]!r:.60}" if key in flat else "absent"


def _flat(run: "Run | Mapping[str, Any]") -> dict[str, Any]:
    from sdjax.training.settings import to_dict

    tables = run if isinstance(run, Mapping) else to_dict(run)
    flat: dict[str, Any] = {}
    for name, table in tables.items():
        if isinstance(table, Mapping):
            flat |= {f"{name}.{key}": _plain(value) for key, value in table.items()}
        else:
            flat[name] = table
    return flat


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
