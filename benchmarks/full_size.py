"""SD1.5 at full size: a checkpoint written by torch, read by sdjax, its networks compared.

    python benchmarks/full_size.py [--config sd1] [--folder FOLDER]

Random weights of the shipped config are saved by diffusers and transformers (SD1: 4.3 GB) with what
their networks compute from fixed inputs; then a process without torch loads the folder, and prints
how far its text states, one UNet evaluation and one decode are from theirs, and its peak memory.
The weights keep the variance from layer to layer, as trained ones do: with fresh ones torch's own
rounding alone moves a decode by 2.4e-5. Both decodes are also held against float64.
"""

import argparse
import multiprocessing
import resource
import tempfile
from pathlib import Path

import numpy as np
from unet_step import weights

LIMITS = {"text": 2e-5, "unet": 5e-5, "decode": 2e-5}


def inputs(config: dict) -> dict[str, np.ndarray]:
    """Token ids, latents and text states, the same for both."""
    rng = np.random.default_rng(0)
    side, width = config["unet"]["sample_size"], config["unet"]["cross_attention_dim"]
    return {
        "ids": rng.integers(0, 49406, (1, 77)).astype(np.int32),
        "x": rng.standard_normal((2, side, side, 4)).astype(np.float32),
        "context": rng.standard_normal((2, 77, width)).astype(np.float32),
        "z": rng.standard_normal((1, side, side, 4)).astype(np.float32),
    }


def write(config: dict, folder: Path) -> None:
    """Save the folder and the peers' outputs."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    import sdjax

    torch.manual_seed(0)
    vocabulary = Path(sdjax.__file__).parent / "assets" / "clip_tokenizer"
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_config(config["unet"]).eval(),
        "vae": diffusers.AutoencoderKL.from_config(config["vae"]).eval(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).eval(),
        "tokenizer": CLIPTokenizer(
            vocab=str(vocabulary / "vocab.json"), merges=str(vocabulary / "merges.txt")
        ),
        "scheduler": diffusers.DDIMScheduler.from_config(config["scheduler"]),
    }
    with torch.no_grad():
        for part in ("unet", "vae", "text_encoder"):
            for name, value in parts[part].named_parameters():
                value.copy_(torch.from_numpy(weights(f"{part}.{name}", tuple(value.shape))))
    pipeline = diffusers.StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    given = {k: torch.from_numpy(v) for k, v in inputs(config).items()}
    with torch.no_grad():
        text = parts["text_encoder"](given["ids"].long()).last_hidden_state
        x, z = (given[k].permute(0, 3, 1, 2) for k in ("x", "z"))
        unet = parts["unet"](x, torch.tensor(601.0), given["context"]).sample
        decode = parts["vae"].decode(z).sample
        exact = parts["vae"].double().decode(z.double()).sample
    outputs = {"text": text}
    for name, value in (("unet", unet), ("decode", decode), ("exact", exact)):
        outputs[name] = value.permute(0, 2, 3, 1)
    np.savez(folder / "outputs.npz", **{k: v.numpy() for k, v in outputs.items()})


def read(config: dict, folder: Path) -> None:
    """Load the folder and compare."""
    import jax

    import sdjax

    before = peak()
    model, params = sdjax.load(folder)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(f"params {size / 2**30:.2f} GiB, peak while loading {(peak() - before) / size:.2f} of it")
    given, theirs = inputs(config), np.load(folder / "outputs.npz")

    def of(name: str) -> dict:
        return {"params": params[name]}

    ours = {
        "text": jax.jit(lambda p, ids: model.text_encoder.apply(p, ids).states)(
            of("text_encoder"), given["ids"]
        ),
        "unet": jax.jit(lambda p, x, c: model.unet.apply(p, x, 601.0, c))(
            of("unet"), given["x"], given["context"]
        ),
        "decode": jax.jit(lambda p, z: model.vae.apply(p, z, method="decode"))(
            of("vae"), given["z"]
        ),
    }
    for name, limit in LIMITS.items():
        gap = relative(ours[name], theirs[name])
        print(f"{name:8} rel {gap:.1e} (limit {limit:.0e}) {'ok' if gap <= limit else 'TOO FAR'}")
    for name, value in (("sdjax", ours["decode"]), ("torch", theirs["decode"])):
        print(f"{name}'s float32 decode is {relative(value, theirs['exact']):.1e} from float64's")


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over largest value."""
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def peak() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run each side in a process of its own, one after the other."""
    from sdjax import config

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="sd1", help="a shipped config with one text encoder")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "checkpoint"
        for side in (read,) if (folder / "outputs.npz").exists() else (write, read):
            process = context.Process(target=side, args=(config.read(args.config), folder))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
