"""`sdjax lab`: samplers compared."""

import argparse
from pathlib import Path

from sdjax import bundled
from sdjax.checkpoints.finding import find
from sdjax.cli import request
from sdjax.cli.generate import keep_programs
from sdjax.cli.show import Interrupted, note, say
from sdjax.errors import InputError
from sdjax.text import read_prompts

ANALYTIC = ("gaussian", "mixture")
"""As in lab.problems, which a test holds them against: asking should not wait for jax."""


def run(asked: argparse.Namespace) -> None:
    """Check what was asked for, compare, and print where the page is."""
    samplers = _names("sampler", asked.samplers, request.SAMPLERS)
    spacings = _names("spacing", asked.spacings, request.SPACINGS)
    nfe = [request.whole("nfe", n, 1, 10_000) for n in asked.nfe.split(",")]
    exact = asked.model in ANALYTIC
    count = request.whole("count", asked.count or (2048 if exact else 16), 2, 1_000_000)
    guidance = None if asked.guidance is None else request.number("guidance", asked.guidance)
    prompts = read_prompts(asked.prompts) if asked.prompts else []
    if exact and prompts:
        raise InputError(f"--prompts are for a model, and {asked.model} has none: leave them out")
    for name in ("guidance", "dtype"):
        if exact and getattr(asked, name) is not None:
            raise InputError(f"--{name} is for a model, and {asked.model} has none: leave it out")
    own = bundled.is_meant(asked.model)
    if own:
        bundled.folder()
    elif not exact and not prompts:
        raise InputError("a model is compared on prompts: give --prompts FILE, one a line")
    out = Path(asked.out)
    if out.exists() and not out.is_dir() and out.suffix != ".md":
        raise InputError(f"{out} is a file: give --out a folder, or a name ending in .md")
    checkpoint = None if exact else find(asked.model)
    from sdjax import lab
    from sdjax.diffusion.profiles import SAMPLERS

    keep_programs(asked)
    problem: lab.Problem
    if checkpoint is None:
        problem = lab.PROBLEMS[asked.model]()
    else:
        from sdjax.checkpoints.loading import load

        model, params = load(checkpoint, dtype=asked.dtype or ("float32" if own else None))
        problem = lab.Pictures(
            model,
            params,
            prompts or _captions(count),
            name=Path(asked.model).name,
            guidance_scale=guidance,
            scenes=own,
        )

    def told(done: int, total: int, what: str) -> None:
        if done < total:
            note(f"{done + 1} of {total}: {what}")

    instances = {name: SAMPLERS[name]() for name in samplers}
    try:
        found = lab.compare(problem, instances, spacings, nfe, count=count, progress=told)
    except KeyboardInterrupt:
        raise Interrupted("nothing was written") from None
    say(str(found.save(out)))


def _captions(count: int) -> list[str]:
    """What scenes are asked for: captions of the world that no training sees."""
    from sdjax.training import scenes
    from sdjax.training.feeding import HELD_OUT

    return [scenes.caption(scenes.scene(HELD_OUT, n), n) for n in range(count)]


def _names(what: str, given: str, names: tuple[str, ...]) -> list[str]:
    """A list with commas, or all there are."""
    if given == "all":
        return list(names)
    found = [request.known(what, name.strip(), names) for name in given.split(",")]
    return [name for name in dict.fromkeys(found) if name]
