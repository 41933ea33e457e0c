"""A model as a problem: its pictures, and what many small steps make of the same noise."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from sdjax import parallel
from sdjax.diffusion.samplers import Heun
from sdjax.errors import InputError
from sdjax.images import contact_sheet
from sdjax.model import Model, Params, decode
from sdjax.tasks.plan import choose
from sdjax.tasks.text_to_image import text_to_image
from sdjax.types import Sampler

Samples = Float[np.ndarray, "n ..."]
_SHOWN = 4


class Pictures:
    """A model's latents for some prompts, taken in turn, from seeds 0, 1, ...

    Right is what Heun's method makes of the same noise in `fine` steps of karras's spacing. With
    `scenes`, pictures are also read, for what of their prompts they show.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        prompts: Sequence[str],
        *,
        name: str = "model",
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        fine: int = 100,
        batch: int = 8,
        scenes: bool = False,
    ):
        if not prompts:
            raise InputError("a model needs prompts to be compared on: give at least one")
        if guidance_scale is None:
            guidance_scale = model.guidance_scale  # as in `text_to_image`
        self.name = name
        self.about = (
            f"Pictures of {len(prompts)} prompts, guidance {guidance_scale:g}; right is Heun's "
            f"method with {fine} steps."
        )
        self.model = model
        self.params = parallel.replicate(params)
        self._prompts = list(prompts)
        self._fine = fine
        self._batch = batch
        self._scenes = scenes
        self._guidance = guidance_scale
        self._size = height, width
        self._references: dict[int, Samples] = {}

    def sigmas(self, spacing: str, steps: int) -> np.ndarray:
        """See `Problem.sigmas`."""
        return choose(self.model, steps, "euler", spacing).sigmas

    def solve(self, sampler: Sampler, spacing: str, steps: int, count: int) -> Samples:
        """See `Problem.solve`: latents, float32."""
        made = []
        for start in range(0, count, self._batch):
            # A full batch every time: one program.
            seeds = [start + n for n in range(self._batch)]
            made.append(
                text_to_image(
                    self.model,
                    self.params,
                    [self._prompts[seed % len(self._prompts)] for seed in seeds],
                    seeds=seeds,
                    steps=steps,
                    sampler=sampler,
                    spacing=spacing,
                    guidance_scale=self._guidance,
                    height=self._size[0],
                    width=self._size[1],
                    output="latents",
                )
            )
        return np.concatenate(made)[:count]

    def reference(self, count: int) -> Samples:
        """See `Problem.reference`."""
        if count not in self._references:
            self._references[count] = self.solve(Heun(), "karras", self._fine, count)
        return self._references[count]

    def truth(self, count: int, seed: int = 0) -> None:
        """What the model was trained on is not known."""

    def picture(self, samples: Samples, right: Samples) -> UInt8[np.ndarray, "h w 3"]:
        """The first few, decoded."""
        shown = self._decoded(samples[:_SHOWN])
        return contact_sheet(list(shown), columns=2 if len(shown) > 1 else 1)

    def attributes(self, samples: Samples) -> float | None:
        """Of pictures of `scenes`: the share that shows all that its prompt asks for."""
        if not self._scenes:
            return None
        from sdjax.training.scenes.measure import score

        images = np.concatenate(
            [
                self._decoded(samples[start : start + self._batch])
                for start in range(0, len(samples), self._batch)
            ]
        )
        prompts = [self._prompts[n % len(self._prompts)] for n in range(len(samples))]
        return score(prompts, images).share

    def order(self, sampler: Sampler, spacing: str) -> None:
        """Not measured: what is right is not known well enough."""

    def _decoded(self, latents: Samples) -> UInt8[np.ndarray, "n h w 3"]:
        model: Any = self.model
        split = parallel.split(np.asarray(latents, np.float32), len(latents))
        pixels = parallel.join(_decoded(model, self.params["vae"], split), len(latents))
        return np.round(255 * np.nan_to_num(pixels)).astype(np.uint8)


def _decode_part(model: Model, vae: Params, latents: Any) -> Any:
    return decode(model, {"vae": vae}, latents)


_decoded = parallel.mapped(_decode_part)
