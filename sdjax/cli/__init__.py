"""The command `sdjax`: parse, call, print."""

from sdjax.cli.command import main

__all__ = ["main"]
