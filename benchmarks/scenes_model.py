"""How good a model of `scenes` is: the numbers and the pictures of its card.

    python benchmarks/scenes_model.py MODEL [MODEL ...] [--prompts 1000] [--out FOLDER]

Each MODEL is what `sdjax.load` takes; the first is shown in pictures. Prompts and renders come from
a world that no training sees. Printed as JSON, and kept in FOLDER beside the pictures: the first
stage's PSNR; the share of images in which everything that the prompt asks for is there, and of
each attribute, read from pixels by `sdjax.training.scenes.measure` (20 steps of DPM-Solver++ 2M);
the same by guidance scale, on a fifth of the prompts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

import sdjax
from sdjax.images import contact_sheet
from sdjax.training import scenes
from sdjax.training.feeding import HELD_OUT
from sdjax.training.first_stage import FirstStage
from sdjax.training.scenes.measure import score

GUIDANCE = (1.0, 2.0, 3.0, 5.0, 8.0)
SHOWN = (
    "a red house by the sea at night",
    "two yellow balloons above snowy mountains at sunset",
    "a blue boat on a lake at dawn in the fog",
    "three green trees among rolling hills on a sunny day",
    "a purple tower in the desert under a rainbow",
    "a white tent in a forest at night with the northern lights",
    "a pink car on the left and an orange house on the right, city, rain",
    "snowy mountains at midnight under the moon",
)
WIDE = (
    "a red house by the sea at sunset",
    "a green tent in a forest at night with the northern lights",
    "two white towers among rolling hills on a clear day",
)


def psnr(model: Any, params: Any, count: int) -> dict[str, float]:
    """Mean over held-out renders, in dB, of encoding to the mean and decoding; and its spread."""
    stage = FirstStage(vae=model.vae)
    reconstruct = jax.jit(stage.reconstruct)
    found = []
    for start in range(0, count, 20):
        held = [scenes.draw(scenes.scene(HELD_OUT, n)) for n in range(start, start + 20)]
        made = np.asarray(reconstruct({"vae": params["vae"]}, (), np.stack(held)))
        error = np.square(made.astype(np.float64) - np.stack(held)).mean((1, 2, 3))
        found.extend(10 * np.log10(255**2 / error))
    return {"mean": float(np.mean(found)), "std": float(np.std(found)), "renders": count}


def sampled(
    model: Any, params: Any, prompts: list[str], batch: int, what: str, **settings: Any
) -> np.ndarray:
    """Images of all prompts, image n from seed n."""
    made = []
    for start in tqdm(range(0, len(prompts), batch), desc=what):
        part = prompts[start : start + batch]
        seeds = list(range(start, start + len(part)))
        full = part + part[-1:] * (batch - len(part)), seeds + seeds[-1:] * (batch - len(part))
        images = sdjax.text_to_image(model, params, full[0], seeds=full[1], steps=20, **settings)
        made.append(images[: len(part)])
    return np.concatenate(made)


def report(prompts: list[str], images: np.ndarray) -> dict[str, Any]:
    """The measure's findings as percentages."""
    found = score(prompts, images)
    each = {name: 100 * found.right[name] / n for name, n in found.asked.items() if n}
    return {"all": 100 * found.share} | {name: round(value, 2) for name, value in each.items()}


def main() -> None:
    """Measure, print, draw."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("model", nargs="+")
    asked.add_argument("--prompts", type=int, default=1000)
    asked.add_argument("--guidance", type=float, default=1.75)
    asked.add_argument("--batch", type=int, default=20)
    asked.add_argument("--out", type=Path, default=Path("runs/scenes-report"))
    asked = asked.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    world = [scenes.scene(HELD_OUT, n) for n in range(asked.prompts)]
    prompts = [scenes.caption(scene, n) for n, scene in enumerate(world)]
    found: dict[str, Any] = {"prompts": len(prompts), "guidance": asked.guidance}
    for n, where in enumerate(asked.model):
        model, params = sdjax.load(where, dtype="float32")
        params = sdjax.replicate(params)
        settings = {"guidance_scale": asked.guidance, "batch": asked.batch, "what": where}
        images = sampled(model, params, prompts, **settings)
        found[where] = report(prompts, images)
        if n:
            continue
        found["psnr"] = psnr(model, params, min(500, max(20, asked.prompts // 20 * 20)))
        few = prompts[: max(1, len(prompts) // 5)]
        found["by guidance"] = {}
        for scale in GUIDANCE:
            made = sampled(model, params, few, asked.batch, f"w = {scale}", guidance_scale=scale)
            found["by guidance"][scale] = report(few, made)
        draw(model, params, asked, images, world, prompts)
    (asked.out / "report.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def draw(
    model: Any, params: Any, asked: Any, images: np.ndarray, world: list, prompts: list[str]
) -> None:
    """Grids: chosen prompts, the first held-out ones, by guidance, wide, reconstructions."""
    shown = list(SHOWN)
    many = sampled(model, params, shown * 2, 8, "grid", guidance_scale=asked.guidance)
    sheet(asked.out / "samples.png", many, shown * 2, columns=4)
    sheet(asked.out / "held_out.png", images[:24], prompts[:24], columns=6)
    rows = []
    for scale in GUIDANCE:
        made = sdjax.text_to_image(
            model, params, shown, seeds=list(range(8)), steps=20, guidance_scale=scale
        )
        rows.extend(made)
    names = [f"w = {scale:g}" for scale in GUIDANCE for _ in shown]
    sheet(asked.out / "guidance.png", rows, names, columns=len(shown))
    wide = sampled(
        model, params, list(WIDE), len(WIDE), "wide", guidance_scale=asked.guidance, width=512
    )
    sheet(asked.out / "wide.png", wide, list(WIDE), columns=1)
    held = np.stack([scenes.draw(scene) for scene in world[:8]])
    stage = FirstStage(vae=model.vae)
    made = np.asarray(jax.jit(stage.reconstruct)({"vae": params["vae"]}, (), held))
    sheet(asked.out / "reconstructions.png", [*held, *made], None, columns=8)


def sheet(path: Path, images: Any, names: list[str] | None, columns: int) -> None:
    """Write a contact sheet."""
    Image.fromarray(contact_sheet(list(images), names, columns=columns)).save(path, optimize=True)


if __name__ == "__main__":
    main()
