"""What a run is fed: its data, in batches, or as latents that were computed once."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from sdjax import parallel
from sdjax.model import Model, Params
from sdjax.text import Tokenizer
from sdjax.training import data, encoding
from sdjax.training.data import Batches, Source
from sdjax.training.settings import Run
from sdjax.training.stage import Batch
from sdjax.types import Array

HELD_OUT = 2**31 - 1
"""The scenes that reconstructions are shown of are of this seed's world, which nobody trains on."""

_LOOKED_AT = 64
"""Examples that captions for samples are taken from."""

Note = Callable[[str], None]


def source_of(run: Run, captions: bool = True) -> Source:
    """The data that the settings name."""
    return data.open(
        run.data.source,
        caption_column=run.data.caption_column if captions else None,
        height=run.data.height,
        width=run.data.width,
        seed=run.data.seed,
        length=run.data.count,
    )


def batches_of(
    run: Run,
    source: Source | data.Cached,
    words: dict[str, Tokenizer],
    process: tuple[int, int],
    shuffle: bool = True,
) -> Batches:
    """The run's batches of a source: `words` are its tokenizers by the key of their ids."""
    if isinstance(source, data.Cached):
        return data.batches(
            source, batch_size=run.run.batch_size, seed=run.data.seed, process=process
        )
    return data.batches(
        source,
        batch_size=run.run.batch_size,
        height=run.data.height,
        width=run.data.width,
        seed=run.data.seed,
        tokenize=words,
        flip=run.data.flip,
        crop=run.data.crop,
        time_ids="ids_2" in words,
        workers=run.data.workers,
        shuffle=shuffle,
        process=process,
    )


def held_out(run: Run, source: Source, count: int) -> np.ndarray:
    """Pictures to look at: scenes of another world, or the first ones of the data."""
    if run.data.source == ("scenes",):
        source = data.scenes(HELD_OUT, run.data.height, run.data.width)
    shown = data.batches(
        source,
        batch_size=min(count, len(source)),
        height=run.data.height,
        width=run.data.width,
        shuffle=False,
    )
    with shown:
        return next(shown)["pixels"]


def captions(source: Source, count: int) -> tuple[str, ...]:
    """The data's first captions, each once and none of them empty: `count` at most.

    Looked for in the first examples alone, which may all be called the same.
    """
    found: dict[str, None] = {}
    for index in range(min(len(source), _LOOKED_AT)):
        example = source[index]
        if isinstance(example, data.Example) and example.caption:
            found[example.caption] = None
        if len(found) == count:
            break
    return tuple(found)


def cached(
    run: Run,
    note: Note,
    model: Model,
    params: Params,
    source: Source,
    words: dict[str, Tokenizer],
    texts: bool,
) -> data.Cached:
    """The data as latents, and as text states where no text encoder learns."""
    assert run.data.cache is not None
    made_of = {
        "data": getattr(source, "digest", str(run.data.source)),
        "files": getattr(source, "stamp", ""),
        "caption_column": run.data.caption_column,
        "vae": _fingerprint(params["vae"]),
        "text_encoder": _fingerprint(params.get("text_encoder", {})) if texts else None,
        "text_encoder_2": _fingerprint(params.get("text_encoder_2", {})) if texts else None,
        "tokenizers": {
            key: _digest([json.dumps(dataclasses.astuple(words[key])).encode()]) for key in words
        },
        "size": [run.data.height, run.data.width],
        "dtype": run.model.dtype,
    }
    encode, networks = parallel.mapped(_encode), parallel.replicate(params)
    size = 32 * parallel.device_count()
    ids = ("ids", "ids_2", "time_ids")

    def made(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        given = {k: v for k, v in batch.items() if k == "pixels" or (texts and k in ids[:2])}
        rest = {k: v for k, v in batch.items() if k in ids and not (texts and k in ids[:2])}
        found = encode((model, run.model.dtype), networks, parallel.split(given, size))
        return {**parallel.join(found, size), **rest}

    plain = dataclasses.replace(run, run=dataclasses.replace(run.run, batch_size=size))
    last = 0

    def progress(done: int, count: int) -> None:
        nonlocal last
        if done * 10 // count > last:
            last = done * 10 // count
            note(f"cached {done} of {count} examples")

    # In the data's own order: an example's number is the same with a cache and without.
    with batches_of(plain, source, words, (0, 1), shuffle=False) as batches:
        found = data.cache(
            batches,
            made,
            run.data.cache,
            len(source),
            made_of=made_of,
            skipped=batches.skipped,
            progress=progress,
        )
    if found.skipped:
        note(
            f"examples that cannot be read, and are left out of the cache: {len(found.skipped)} of "
            f"{len(found)}"
        )
    return found


def _encode(static: tuple[Model, str], params: Params, batch: Batch) -> dict[str, Array]:
    model, dtype = static
    return encoding.cached(model, params, batch, dtype)


def _fingerprint(tree: Params) -> str:
    """Which weights these are."""
    return _digest(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
