"""`Hearing`: the stage that teaches a text encoder what captions ask for, before any picture."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sdjax.model import Params
from sdjax.models.clip import CLIPTextModel
from sdjax.training.fresh import fresh
from sdjax.training.scenes.labels import WISHES
from sdjax.training.stage import Batch, Gradients


@dataclass(frozen=True)
class Hearing:
    """Cross-entropies of every wish, read by one linear map from states that saw all of a caption.

    CLIP's text encoder comes to Stable Diffusion knowing what words mean together; this one learns
    it from captions alone, in minutes. Read are the states of the end-of-text token and of the last
    place, behind the padding: cross-attention sees them all.

    Batch: `ids` int32 [b, s]; `labels` int32 [b, n] as `labels.wishes` gives them. Trains
    "text_encoder" and "heads", the map, which is of no use afterwards.
    """

    encoder: CLIPTextModel

    def init(self, key: Key[Array, ""]) -> tuple[Params, tuple]:
        """Draw the encoder's params and the map."""
        width = self.encoder.text.hidden_size
        heads = jax.random.normal(jax.random.fold_in(key, 1), (width, sum(WISHES))) / width**0.5
        return {"text_encoder": fresh(self.encoder, key), "heads": {"kernel": heads}}, ()

    def first_extra(self, params: Params) -> tuple:
        """Nothing: all is learnt by gradients."""
        return ()

    def gradients(
        self,
        params: Params,
        extra: tuple,
        frozen: Params,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
    ) -> Gradients:
        """Gradients of the mean over images of the summed losses.

        Metrics: `loss`, and `right`, the share of captions of which every wish was heard.
        """
        labels = jnp.asarray(batch["labels"])

        def loss(params: Params) -> tuple[Array, dict[str, Array]]:
            out: Any = self.encoder.apply({"params": params["text_encoder"]}, batch["ids"])
            seen = jnp.stack([out.pooled, out.states[:, -1]])
            logits = seen @ params["heads"]["kernel"]
            parts, right = zip(*itertools.starmap(_hear, _split(logits, labels)), strict=True)
            total = jnp.stack(parts).sum(0).mean()
            return total, {"loss": total, "right": jnp.stack(right).all(0).mean()}

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        return Gradients(grads, extra, metrics)


def _split(
    logits: Float[Array, "two b total"], labels: Int[Array, "b n"]
) -> list[tuple[Float[Array, "two b size"], Int[Array, " b"]]]:
    parts = jnp.split(logits, list(itertools.accumulate(WISHES))[:-1], axis=-1)
    return list(zip(parts, labels.T, strict=True))


def _hear(
    logits: Float[Array, "two b size"], label: Int[Array, " b"]
) -> tuple[Float[Array, "two b"], Array]:
    """The cross-entropies of one wish, and whether it is the likeliest."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[None, :, None], -1)[..., 0]
    return -chosen, logits.argmax(-1) == label
