"""`save`: a model and its params to a diffusers folder, or to a single file."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import config as shipped
from sdjax.checkpoints import naming, placing, safetensors, single_file_saving
from sdjax.checkpoints.files import write_json
from sdjax.checkpoints.folder import ADVICE, INDEX, NETWORKS, TOKENIZERS
from sdjax.checkpoints.tensors import floating
from sdjax.errors import InputError
from sdjax.model import Model

VERSION = "0.42.1"
"""The release of diffusers whose layout is written; it asks for one in inpainting folders."""

FILES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


def save(
    where: str | os.PathLike,
    model: Model,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that torch's diffusers loads too; loading it gives the same bytes back.

    The checkpoint appears under its name only when it is whole.

    Args:
        where: a folder to make, or a path that ends in .safetensors for a single file.
        model: the networks, tokenizers and schedule.
        params: component to nested dict, as `load` gives.
        dtype: "float32", "bfloat16" or "float16" to cast to; None keeps what the params have.
        overwrite: replace a checkpoint that is there.

    Returns:
        The path.

    Raises:
        InputError: something is there already, or the params are not the model's.
    """
    path = Path(where)
    target = None if dtype is None else floating(placing.dtype_name(dtype))
    for name in NETWORKS:
        if getattr(model, name) is not None:
            compare(getattr(model, name), params.get(name), name)
    taken = is_taken(path, overwrite)
    if path.suffix == ".safetensors":
        if path.is_dir():
            raise InputError(f"{path} is a folder: give another path for a single file")
        single_file_saving.write(path, model, params, target)
        lost = single_file_saving.lost(model)
        if lost:
            warnings.warn(
                f"{path} does not hold {lost}: keep the folder, and load the file with config= "
                "(--config) of it",
                stacklevel=2,
            )
        return path
    if taken and not (path / INDEX).is_file():
        raise InputError(f"{path} is not a checkpoint, so it is not replaced: give another path")
    with whole_folder(path) as part:
        write_folder(part, model, params, target)
    return path


def is_taken(path: Path, overwrite: bool) -> bool:
    """Whether something stands at a path that is to be written.

    Raises:
        InputError: it may not be replaced, or its folder is not there.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder, so {path.name} cannot be made in it")
    taken = path.is_symlink() or (any(path.iterdir()) if path.is_dir() else path.exists())
    if taken and not overwrite:
        raise InputError(f"{path} is there already: give another path, or overwrite=True")
    return taken


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name, and the place of what was there, when it is whole."""
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".part"))
    try:
        part.chmod(path.parent.stat().st_mode & 0o777)
        yield part
        if path.is_dir():
            shutil.rmtree(path)
        part.rename(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def compare(module: Any, params: Any, name: str) -> None:
    """Check that params have a module's keys and shapes.

    Raises:
        InputError: naming the first that differs.
    """
    wanted = naming.leaves(module)
    flat = dict(naming.flatten(params)) if isinstance(params, Mapping) else {}
    for path, shape in ((leaf.path, leaf.shape) for leaf in wanted.values()):
        key = "/".join((name, *path))
        if path not in flat:
            raise InputError(f"params lack {key!r}: give the params of this model")
        if naming.to_torch_shape(path[-1], flat[path].shape) != shape:
            raise InputError(
                f"params have {key!r} with shape {list(flat[path].shape)}, which is not the "
                "model's: give the params of this model"
            )
    if len(flat) > len(wanted):
        known = {leaf.path for leaf in wanted.values()}
        extra = next(path for path in flat if path not in known)
        raise InputError(
            f"params have {'/'.join((name, *extra))!r}, which the model does not know: remove it"
        )


def write_folder(
    path: Path, model: Model, params: Mapping[str, Any], dtype: np.dtype | None
) -> None:
    """Fill an empty folder."""
    write_json(path / INDEX, index(model))
    for name, (library, _) in NETWORKS.items():
        module = getattr(model, name)
        if module is None:
            continue
        (path / name).mkdir()
        write_json(path / name / "config.json", module.config())
        entries = [
            entry(key, leaf_path, leaf, dtype, name)
            for leaf_path, leaf in naming.flatten(params[name])
            for key in [spelled(naming.torch_key(leaf_path), name)]
        ]
        safetensors.write(path / name / FILES[library], entries)
    for name in TOKENIZERS:
        tokenizer = getattr(model, name)
        if tokenizer is not None:
            tokenizer.save(path / name)
    schedulers = {"scheduler": model.scheduler.dict()}
    if model.family == "x4-upscaler":
        schedulers["low_res_scheduler"] = shipped.read("x4-upscaler")["low_res_scheduler"]
    for name, values in schedulers.items():
        (path / name).mkdir()
        write_json(path / name / "scheduler_config.json", values)


def spelled(key: str, name: str) -> str:
    """CLIP's keys with `text_model.`: transformers before 5.6 knows only these, later ones both."""
    return f"text_model.{key}" if name == "text_encoder" else key


def entry(
    key: str, path: tuple[str, ...], leaf: Any, dtype: np.dtype | None, name: str
) -> safetensors.Entry:
    """One parameter, fetched from its device when its turn comes."""
    target = dtype or np.dtype(leaf.dtype)
    if target not in safetensors.NAMES:
        raise InputError(f"params have {key!r} in {target.name}, which no file can hold: cast it")

    def read() -> np.ndarray:
        array = np.asarray(leaf)
        with np.errstate(over="ignore"):
            cast = np.asarray(naming.to_torch_axes(path[-1], array), target, order="C")
        if target.itemsize < array.dtype.itemsize and not placing.finite(cast):
            raise InputError(
                f"params have {'/'.join((name, *path))!r} with values too large for "
                f"{target.name}: save as float32 or bfloat16"
            )
        return cast

    return safetensors.Entry(key, naming.to_torch_shape(path[-1], leaf.shape), target, read)


def index(model: Model) -> dict[str, Any]:
    """The content of `model_index.json`."""
    plain = not model.family.startswith("sdxl")
    written = dict(shipped.read(model.family or "sd1").get("model_index", {}))
    for name, classes in NETWORKS.items():
        if getattr(model, name) is not None:
            written[name] = list(classes)
        elif not plain:
            written[name] = [None, None]
    for name in TOKENIZERS:
        if getattr(model, name) is not None:
            written[name] = ["transformers", "CLIPTokenizer"]
        elif not plain:
            written[name] = [None, None]
    written["_diffusers_version"] = VERSION
    if (model.steps, model.guidance_scale) != (Model.steps, Model.guidance_scale):
        written[ADVICE] = {"steps": model.steps, "guidance_scale": model.guidance_scale}
    written["scheduler"] = ["diffusers", model.scheduler.dict()["_class_name"]]
    if model.family == "x4-upscaler":
        written["low_res_scheduler"] = ["diffusers", "DDPMScheduler"]
    elif plain:
        written |= {name: [None, None] for name in ("safety_checker", "feature_extractor")}
        written["requires_safety_checker"] = False
    else:
        written["force_zeros_for_empty_prompt"] = model.zero_negative
    return written
