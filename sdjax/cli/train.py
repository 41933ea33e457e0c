"""`sdjax train`: settings to a trained model."""

import argparse
from pathlib import Path

from sdjax.cli.generate import keep_programs
from sdjax.cli.show import Interrupted, note, say
from sdjax.errors import InputError
from sdjax.training import checks, folder, settings


def run(asked: argparse.Namespace) -> None:
    """Check all that can be checked without jax, then train, and print what was saved."""
    wanted = settings.read(asked.config, asked.set)
    if asked.show:
        say(settings.dumps(wanted).rstrip())
        return
    checks.check_files(wanted)
    if asked.fresh and asked.resume:
        raise InputError("--fresh and --resume are both given: take one")
    if asked.resume and not folder.steps(Path(wanted.run.out)):
        raise InputError(
            f"there is no checkpoint in {wanted.run.out} to go on from: leave --resume out"
        )
    folder.prepare(wanted, resume=not asked.fresh)
    from sdjax.training.loop import train

    keep_programs(asked)
    try:
        path = train(wanted, note=note, resume=not asked.fresh)
    except KeyboardInterrupt:
        raise Interrupted(f"the last checkpoint in {wanted.run.out} is kept") from None
    say(str(path))
