"""`sdjax inspect`: what a checkpoint is."""

import argparse
import dataclasses
import json
import os
from typing import Any

from sdjax.checkpoints.finding import find
from sdjax.cli.show import printable, say


def run(asked: argparse.Namespace) -> None:
    """Print what is known of a checkpoint without loading its weights."""
    found = find(asked.path, config=asked.config, variant=asked.variant)
    from sdjax.checkpoints import inspect

    report = inspect(found, config=asked.config, variant=asked.variant)
    if asked.json:
        whole = {"parameters": report.parameters, "dtypes": report.dtypes, "sha256": report.sha256}
        say(json.dumps(dataclasses.asdict(report) | whole, indent=2, default=_plain))
    else:
        say("\n".join(printable(line) for line in str(report).splitlines()))


def _plain(value: Any) -> str:
    return os.fspath(value)
