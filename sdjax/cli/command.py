"""The command line: what can be asked, and how it ends."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from sdjax.cli import convert, generate, inspect, lab, train
from sdjax.cli.request import CFG_PLUS_PLUS, GUIDANCE, NOISES, SAMPLERS, SPACINGS
from sdjax.cli.show import Interrupted, note, say
from sdjax.errors import InputError

_MODEL = (
    "a diffusers folder, a .safetensors or .ckpt file, a hub id such as org/name, or scenes, the "
    "model that comes with sdjax"
)

_CONFIG = "for a single file: a shipped config's name, or a TOML file"


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one sentence like all others."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise InputError(f"{message} (`{self.prog} --help` says what there is)")


def parser() -> Parser:
    """What can be asked. Values stay text here: `request` checks them all."""
    top = Parser("sdjax", description="Stable Diffusion in JAX.", allow_abbrev=False)
    top.add_argument("--version", action="store_true", help="say which sdjax this is")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    make = commands.add_parser(
        "generate",
        help="make images from prompts",
        description="Make images from prompts. Their paths go to standard output, all else to "
        "standard error. An image is a function of weights, prompt, seed and settings; every "
        "PNG carries them, and --from repeats it.",
        allow_abbrev=False,
    )
    make.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="what to see; several make several"
    )
    make.add_argument(
        "--prompts", dest="file", metavar="FILE", help="prompts of a text file, one a line"
    )
    make.add_argument(
        "--from",
        dest="source",
        metavar="IMAGE.png",
        help="repeat an image; other options change it",
    )
    make.add_argument("--model", metavar="PATH", help=f"{_MODEL} (scenes)")
    make.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="a LoRA of diffusers, peft or kohya, and how much of it (1); as often as needed",
    )
    make.add_argument("--negative", metavar="TEXT", help="what not to see")
    make.add_argument("--steps", metavar="N", help="1 to 1000 (the model's own, else 20)")
    make.add_argument(
        "--sampler",
        metavar="NAME",
        help=f"{', '.join(SAMPLERS)}; under CFG++ {', '.join(CFG_PLUS_PLUS)} (the model's own)",
    )
    make.add_argument(
        "--spacing",
        metavar="NAME",
        help=f"of noise levels: {', '.join(SPACINGS)} (the model's own)",
    )
    make.add_argument(
        "--guidance",
        metavar="SCALE",
        help="how closely to follow the prompt; 1 is off (the model's own, else 7.5); of CFG++ "
        "0 to 1 (0.6)",
    )
    make.add_argument("--guidance-method", metavar="NAME", help=f"how: {', '.join(GUIDANCE)} (cfg)")
    make.add_argument("--seed", metavar="N", help="0 to 2**64 - 1 (drawn, and said)")
    make.add_argument(
        "--noise",
        metavar="NAME",
        help=f"as another program draws it from the seed: {', '.join(NOISES)} (sdjax's own)",
    )
    make.add_argument(
        "--count", metavar="N", help="images of each prompt, with seeds N, N + 1, ... (1)"
    )
    make.add_argument("--width", metavar="PIXELS", help="a multiple of 8 (the model's own)")
    make.add_argument("--height", metavar="PIXELS", help="a multiple of 8 (the model's own)")
    make.add_argument(
        "--dtype",
        help="of the weights: float32, bfloat16 or float16; computed in bfloat16 where they are, "
        "else in float32 (float32 on a CPU, elsewhere as stored, but float16 as bfloat16)",
    )
    make.add_argument(
        "--batch", metavar="N", help="images at once (one a device on a CPU, elsewhere four)"
    )
    make.add_argument(
        "--out", metavar="PATH", help="a folder, or a name ending in .png for one image (images)"
    )
    _source(make)
    _cache(make)

    learn = commands.add_parser(
        "train",
        help="train a model, or go on with it",
        description="Train as a TOML file says, or one that ships with sdjax, by its name. A run "
        "that was stopped, or killed, goes on from its last checkpoint when the command is given "
        "again. Ctrl-C and SIGTERM save first. The path of what is saved goes to standard output.",
        allow_abbrev=False,
    )
    learn.add_argument("config", metavar="CONFIG", help="a .toml file, or a shipped run's name")
    learn.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, such as optimizer.learning_rate=1e-4; no value takes it away; "
        "as often as needed",
    )
    learn.add_argument("--show", action="store_true", help="print all settings and do nothing")
    learn.add_argument(
        "--resume", action="store_true", help="refuse to begin where there is no checkpoint"
    )
    learn.add_argument(
        "--fresh", action="store_true", help="refuse to go on where there is a checkpoint"
    )
    _cache(learn)

    bench = commands.add_parser("lab", help="compare samplers", allow_abbrev=False)
    rank = bench.add_subparsers(
        dest="lab", metavar="compare", required=True, parser_class=Parser
    ).add_parser(
        "compare",
        help="samplers at equal numbers of evaluations",
        description="Compare samplers at equal numbers of evaluations, from the same noise: error, "
        "order, distance, pictures. Writes comparison.csv and index.html, which needs nothing "
        "beside it; its path goes to standard output.",
        allow_abbrev=False,
    )
    rank.add_argument("--samplers", default="all", metavar="NAMES", help="with commas, or all")
    rank.add_argument(
        "--spacings", default="karras", metavar="NAMES", help="with commas, or all (karras)"
    )
    rank.add_argument("--nfe", default="5,10,20,40", metavar="N,N", help="evaluations (5,10,20,40)")
    rank.add_argument(
        "--model",
        default="mixture",
        help="gaussian, mixture, or what generate takes; of scenes, how much of their prompts "
        "pictures show is measured too (mixture)",
    )
    rank.add_argument(
        "--prompts", metavar="FILE", help="of a model, one a line (of scenes: captions)"
    )
    rank.add_argument("--guidance", metavar="SCALE", help="of a model (its own, else 7.5)")
    rank.add_argument("--dtype", help="of a model's weights (as stored)")
    rank.add_argument("--count", metavar="N", help="samples in each cell (2048; of a model 16)")
    rank.add_argument(
        "--out", default="lab", metavar="PATH", help="a folder; .md: tables only (lab)"
    )
    _cache(rank)

    look = commands.add_parser("inspect", help="say what a checkpoint is", allow_abbrev=False)
    look.add_argument("path", metavar="PATH", help=_MODEL)
    look.add_argument("--json", action="store_true", help="for programs")
    look.add_argument("--config", help=_CONFIG)
    look.add_argument("--variant", help="of a folder's files, such as fp16")

    change = commands.add_parser(
        "convert",
        help="write a checkpoint in another form",
        description="Write a diffusers folder, or one file if OUT ends in .safetensors.",
        allow_abbrev=False,
    )
    change.add_argument("path", metavar="IN", help=_MODEL)
    change.add_argument("out", metavar="OUT", help="a folder, or a name ending in .safetensors")
    change.add_argument("--dtype", help="float32, bfloat16 or float16 (as stored)")
    change.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    _source(change)
    return top


def _cache(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cache-dir", metavar="PATH", help="where compiled programs are kept (~/.cache/sdjax/xla)"
    )
    command.add_argument("--no-cache", action="store_true", help="keep no compiled programs")


def _source(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", help=_CONFIG)
    command.add_argument("--ema", action="store_true", help="for a single file: averaged weights")
    command.add_argument("--variant", help="of a folder's files, such as fp16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status: 0, 2 for what cannot work, 130 when interrupted.

    What cannot work is what was asked, or what the system refuses: a file, a full disk, memory.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
            _run(parser().parse_args(arguments))
    except InputError as error:
        note(f"error: {error}")
        return 2
    except OSError as error:
        named = f"{error.filename}: " if error.filename else ""
        note(f"error: {named}{error.strerror or _first_line(error)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        # XLA's error is a RuntimeError: its class would have to be imported from jax.
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        note(
            f"error: there is not enough memory ({_first_line(error)}): make less at once (smaller "
            "pictures, a smaller batch), or in a smaller dtype"
        )
        return 2
    except KeyboardInterrupt as stop:
        done = str(stop) if isinstance(stop, Interrupted) else "nothing was written"
        print(file=sys.stderr)
        note(f"stopped: {done}")
        return 130
    return 0


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")[:160]


def _run(asked: argparse.Namespace) -> None:
    commands = {
        "generate": generate.run,
        "train": train.run,
        "lab": lab.run,
        "inspect": inspect.run,
        "convert": convert.run,
    }
    if asked.version:
        from sdjax import __version__

        say(f"sdjax {__version__}")
    elif asked.command is None:
        say(parser().format_help().rstrip())
    else:
        commands[asked.command](asked)
