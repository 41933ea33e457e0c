"""A diffusers folder: `model_index.json`, and for each component a config and weights.

Classes are compared by name with the lists here and never imported; every config is read and every
file's header checked before any weight is. The layouts are those that diffusers 0.42 and
transformers 5 write: one file or shards with an index, safetensors or pickles, with or without a
variant (`fp16`) in the name; and the Hub's cache, whose snapshots are links to blobs.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdjax.checkpoints import pickles, safetensors
from sdjax.checkpoints.files import AGAIN, read_json, refuse_impostor
from sdjax.checkpoints.tensors import Tensor, Tensors
from sdjax.errors import InputError

INDEX = "model_index.json"
ADVICE = "_sdjax"
"""The index's key for the steps and guidance that suit a model; diffusers passes such keys over."""

PIPELINES = frozenset(
    f"StableDiffusion{kind}Pipeline"
    for kind in ("", "Img2Img", "Inpaint", "Upscale", "XL", "XLImg2Img", "XLInpaint")
) | {"StableDiffusionInpaintPipelineLegacy", "LatentConsistencyModelPipeline"}

NETWORKS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
"""The components with weights, and the only class that each may have."""

TOKENIZERS = ("tokenizer", "tokenizer_2")
SCHEDULERS = ("scheduler", "low_res_scheduler")
UNUSED = {
    "safety_checker": ("StableDiffusionSafetyChecker",),
    "feature_extractor": ("CLIPFeatureExtractor", "CLIPImageProcessor"),
    "image_encoder": ("CLIPVisionModelWithProjection",),
    "watermarker": ("StableDiffusionXLWatermarker",),
}
"""Components that folders may have and that are left where they are."""

LIBRARIES = frozenset(
    ("diffusers", "transformers", "stable_diffusion", "stable_diffusion_safe")
    + ("diffusers.pipelines.stable_diffusion", "diffusers.pipelines.stable_diffusion_safe")
)
SCHEDULER_CLASS = re.compile(
    r"(DDIM|DDPM|PNDM|LMSDiscrete|Euler(Ancestral)?Discrete|HeunDiscrete|KDPM2(Ancestral)?Discrete"
    r"|DPMSolver(Multistep(Inverse)?|Singlestep|SDE)|DEISMultistep|UniPCMultistep|SASolver|LCM|TCD"
    r"|DDIM(Parallel|Inverse)|DDPMParallel|IPNDM|EDM(Euler|DPMSolverMultistep)"
    r"|CMStochasticIterative)Scheduler"
)


@dataclass
class Component:
    """One network of a folder: where it is, its config, its unread tensors."""

    path: Path
    config: dict[str, Any]
    tensors: Tensors


@dataclass
class Folder:
    """A diffusers folder, opened: nothing but configs and headers has been read."""

    path: Path
    index: dict[str, Any]
    networks: dict[str, Component] = field(default_factory=dict)
    schedulers: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokenizers: dict[str, Path] = field(default_factory=dict)


def open(path: Path, variant: str | None = None) -> Folder:
    """Open a diffusers folder.

    Args:
        path: the folder; of the Hub's cache, what `snapshot` returns.
        variant: the variant of the weights, such as "fp16"; None takes the plain files, or the only
            variant that is there.

    Raises:
        InputError: naming the file and key that is missing, unknown or damaged.
    """
    if not (path / INDEX).exists() and not (path / INDEX).is_symlink():
        raise InputError(f"{path} has no {INDEX}: {instead(path)}")
    index = read_json(path / INDEX)
    folder = Folder(path, index)
    check_index(path / INDEX, index)
    present = [name for name in index if not name.startswith("_") and named(index[name])]
    networks = [name for name in present if name in NETWORKS]
    for name in present:
        if name in (*NETWORKS, *TOKENIZERS) and not (path / name).is_dir():
            raise InputError(
                f"{path / name} is not there, and {path / INDEX} names it: complete the download"
            )
    has_variant(path, variant, [variants_in(path / name) for name in networks])
    configs = {}
    for name in networks:
        part = path / name
        config = read_json(part / "config.json")
        class_name = config.get("_class_name", NETWORKS[name][1])
        if class_name != NETWORKS[name][1]:
            raise InputError(
                f"{part / 'config.json'} is of the class {str(class_name)[:80]!r}, where sdjax "
                f"knows {NETWORKS[name][1]}"
            )
        configs[name] = config
    for name in present:
        if name in SCHEDULERS:
            folder.schedulers[name] = scheduler(path / name / "scheduler_config.json", index[name])
        elif name in TOKENIZERS:
            folder.tokenizers[name] = path / name
    for name in ("unet", "vae", "scheduler"):
        if name not in present:
            raise InputError(f"{path / INDEX} has no {name!r}: complete the checkpoint")
    for name, config in configs.items():
        folder.networks[name] = Component(path / name, config, weights(path / name, variant))
    return folder


def autoencoder(path: Path, variant: str | None = None) -> Component | None:
    """The one network of a folder that is an autoencoder's alone; None if it is anything else."""
    config = path / "config.json"
    if (path / INDEX).exists() or not config.is_file():
        return None
    read = read_json(config)
    if read.get("_class_name") != NETWORKS["vae"][1]:
        return None
    has_variant(path, variant, [variants_in(path)])
    return Component(path, read, weights(path, variant))


def has_variant(path: Path, variant: str | None, found: Iterable[Mapping[str | None, str]]) -> None:
    """Refuse a variant that none of a folder's components has."""
    has = {name for variants in found for name in variants}
    if variant is not None and variant not in has:
        known = sorted(name for name in has if name)
        raise InputError(
            f"{path} has no weights of the variant {variant!r}: it has "
            f"{', '.join(map(repr, known)) if known else 'only plain ones'}"
        )


def named(value: Any) -> bool:
    """Whether an entry of the index names a component that is there."""
    return isinstance(value, list) and value != [None, None]


def scheduler(path: Path, entry: Any) -> dict[str, Any]:
    """A scheduler's config, with its class from the index when it does not say."""
    config = read_json(path)
    name = config.setdefault("_class_name", entry[1])
    if not isinstance(name, str) or not SCHEDULER_CLASS.fullmatch(name):
        raise InputError(f"{path} is of the class {str(name)[:80]!r}, which sdjax does not know")
    return config


def check_index(path: Path, index: Mapping[str, Any]) -> None:
    """Compare the classes that an index names with ours, by name."""
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        raise InputError(
            f"{path}: '_class_name' is {str(pipeline)[:80]!r}, where sdjax knows Stable Diffusion "
            "1, 2 and XL, their inpainting and the x4 upscaler: choose a checkpoint of these"
        )
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list | dict) or value == [None, None]:
            continue
        if not isinstance(value, list) or len(value) != 2:
            raise InputError(f"{path}: {name[:80]!r} must be a library and a class: {AGAIN}")
        library, kind = (part if isinstance(part, str) else repr(part)[:80] for part in value)
        if name in NETWORKS:
            good = (library, kind) == NETWORKS[name]
        elif name in TOKENIZERS:
            good = library == "transformers" and kind in ("CLIPTokenizer", "CLIPTokenizerFast")
        elif name in SCHEDULERS:
            good = library == "diffusers" and SCHEDULER_CLASS.fullmatch(kind) is not None
        else:
            good = library in LIBRARIES and kind in UNUSED.get(name, ())
        if not good:
            known = f", where sdjax knows {NETWORKS[name][1]}" if name in NETWORKS else ""
            raise InputError(
                f"{path}: {name[:80]!r} is of the class {library[:80]}.{kind[:80]}"
                f"{known or ', which is not one that sdjax knows'}: choose a checkpoint of Stable "
                "Diffusion 1, 2 or XL"
            )


def snapshot(path: Path) -> Path:
    """The folder of the current revision, if a path is a model in the Hub's cache."""
    snapshots = path / "snapshots"
    if (path / INDEX).exists() or not snapshots.is_dir():
        return path
    ref = path / "refs" / "main"
    if ref.is_file() and ref.stat().st_size < 200:
        revision = ref.read_text(errors="replace").strip()
        if re.fullmatch(r"[\w-]+", revision) and (snapshots / revision).is_dir():
            return snapshots / revision
        raise InputError(f"{ref} names {revision[:80]!r}, which is not in {snapshots}: {AGAIN}")
    found = sorted(p for p in snapshots.iterdir() if p.is_dir())
    if len(found) != 1:
        raise InputError(f"{snapshots} has {len(found)} revisions: give one of them")
    return found[0]


def instead(path: Path) -> str:
    """What somebody may have meant by a folder without an index."""
    if (path.parent / INDEX).is_file():
        return f"it is one component of a checkpoint, give the folder above, {path.parent}"
    files = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".ckpt", ".bin"))
    inner = sorted(p.name for p in path.iterdir() if (p / INDEX).is_file())
    if inner:
        return f"give a folder in it, such as {path / inner[0]}"
    if (path / "config.json").is_file():
        return "it is one component, give the folder of a whole checkpoint"
    if files:
        return f"give a file in it, such as {path / files[0]}"
    return "give the folder of a checkpoint that diffusers saved, or a single file"


_STEM = r"(?:diffusion_pytorch_model|model|pytorch_model)"
_SUFFIX = r"(?:safetensors|bin)"
_VARIANT = r"(?:\.(?P<variant>[\w-]+))?"
_PLAIN = re.compile(rf"{_STEM}{_VARIANT}\.{_SUFFIX}")
_INDEXED = re.compile(rf"(?P<stem>{_STEM})\.(?P<suffix>{_SUFFIX})\.index{_VARIANT}\.json")
# Releases differ in where they put the variant.
_SHARD = re.compile(
    rf"(?P<stem>{_STEM})(?:\.(?P<early>[\w-]+))?-\d+-of-\d+{_VARIANT}\.(?P<suffix>{_SUFFIX})"
)


def candidates(names: Iterable[str]) -> dict[str | None, str]:
    """For each variant (None: plain), the file of weights to take among a component's files.

    safetensors come before pickles, a whole file before an index of shards.
    """
    found: dict[str | None, list[str]] = {}
    for name in names:
        match = _INDEXED.fullmatch(name) or (
            None if _SHARD.fullmatch(name) else _PLAIN.fullmatch(name)
        )
        if match is not None and match["variant"] != "non_ema":
            found.setdefault(match["variant"], []).append(name)

    def rank(name: str) -> tuple[bool, bool, str]:
        return ("safetensors" not in name, name.endswith(".json"), name)

    return {variant: min(names, key=rank) for variant, names in found.items()}


def shards_of(index: str, names: Iterable[str]) -> list[str]:
    """The shards that belong to an index, by their names."""
    wanted = _INDEXED.fullmatch(index)
    shards = [match for match in map(_SHARD.fullmatch, names) if match is not None]
    return [
        shard[0]
        for shard in shards
        if wanted is not None
        and (shard["stem"], shard["suffix"]) == (wanted["stem"], wanted["suffix"])
        and (shard["early"] or shard["variant"]) == wanted["variant"]
    ]


def variants_in(part: Path) -> dict[str | None, str]:
    """The variants of a component's weights, and the file of each."""
    return candidates(listed(part))


def listed(part: Path) -> list[str]:
    """The names in a folder, sorted."""
    try:
        return sorted(p.name for p in part.iterdir())
    except OSError as error:
        raise InputError(
            f"{part} cannot be listed ({error.strerror}): check the path and its mode"
        ) from None


def choose(found: Mapping[str | None, str], variant: str | None, part: str | Path) -> str:
    """The file of weights to load, by variant."""
    if variant in found:
        return found[variant]
    if None in found:
        return found[None]
    if len(found) == 1:
        return next(iter(found.values()))
    raise InputError(
        f"{part} has the variants {', '.join(sorted(map(repr, found)))}: choose one (variant=)"
    )


def weights(part: Path, variant: str | None) -> Tensors:
    """The tensors of one component, whichever way its files lie."""
    names = listed(part)
    found = candidates(names)
    if not found:
        shards = [name for name in names if _SHARD.fullmatch(name)]
        if shards:
            raise InputError(
                f"{part} has shards ({shards[0]}, ...) but not their index: complete the download"
            )
        raise InputError(
            f"{part} has no weights (diffusion_pytorch_model or model, .safetensors or .bin): "
            "complete the download"
        )
    name = choose(found, variant, part)
    if name.endswith(".json"):
        return sharded(part / name)
    return read(part / name)


def read(path: Path) -> Tensors:
    """The tensors of one file, by its suffix."""
    return safetensors.open(path) if path.suffix == ".safetensors" else pickles.open(path)


def sharded(path: Path) -> Tensors:
    """The tensors of shards, from their index.

    Raises:
        InputError: a shard that is outside the folder or not there, a key that is not where the
            index says, or that the index does not say.
    """
    index = read_json(path, limit=64 * 2**20)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{path} has no 'weight_map': {AGAIN}")
    shards: dict[str, Tensors] = {}
    for key, name in places.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w][\w.-]*", name):
            raise InputError(
                f"{path} places {key[:80]!r} in {str(name)[:80]!r}, which is not the name of a "
                f"file beside it: {AGAIN}"
            )
        if name not in shards:
            refuse_impostor(path.parent / name)
            shards[name] = read(path.parent / name)
    tensors: dict[str, Tensor] = {}
    for key, name in places.items():
        if key not in shards[name]:
            raise InputError(f"{path} places {key[:80]!r} in {name}, which lacks it: {AGAIN}")
        tensors[key] = shards[name][key]
    for name, shard in shards.items():
        for key in shard:
            if places.get(key) != name:
                raise InputError(
                    f"{shard.path} has {key[:80]!r}, which {path.name} does not place there: "
                    f"{AGAIN}"
                )
    return Tensors(tensors, path)
