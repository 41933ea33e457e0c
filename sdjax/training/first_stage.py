"""`FirstStage`: training the autoencoder between pixels and latents."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key, UInt8

from sdjax.errors import InputError
from sdjax.model import Params
from sdjax.models import vq
from sdjax.models.convolution import direct
from sdjax.models.discriminator import Discriminator
from sdjax.models.lpips import LPIPS
from sdjax.models.vae import AutoencoderKL, draw
from sdjax.models.vq import VQModel
from sdjax.training.first_stage_loss import FirstStageLoss
from sdjax.training.stage import Batch, Gradients
from sdjax.types import Array

__all__ = ["FirstStage", "FirstStageLoss", "latent_noise", "measure_scale", "split", "to_float"]

LATENT_NOISE = 0
"""What an image's key is folded with for the draw of its latents."""

Images = Float[Array, "b h w c"]
Latents = Float[Array, "b p q z"]
Scalar = Float[Array, ""]
Metrics = dict[str, Scalar]


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """Training an autoencoder, with or without LPIPS and a discriminator.

    `params` holds "vae", "discriminator" where there is one, and "logvar" (a scalar) where it is
    learnt; `frozen` holds "lpips" where there is one, and as "vae" those parts of the autoencoder
    that are not in `params`: with the encoder there, a decoder learns for latents that stay
    (`split`); batches hold "pixels", uint8 [b, h, w, 3].
    `extra` is (), or the averages of an EMA codebook: the codebook in `params` is then not used,
    and `autoencoder` gives the tree to save.

    One call gives both networks' gradients at the same reconstructions: the generator's for the
    autoencoder (and logvar), and for the discriminator those of its own loss, in which the
    reconstructions are constants. CompVis takes turns instead, so that its discriminator sees the
    reconstructions of an autoencoder one step further. Before `disc_start` the discriminator is not
    evaluated, and its gradients and metrics are 0.

    The loss of an image depends on no other, but for the discriminator, whose batch norm and
    adaptive weight are of the batch that a call is given.
    """

    vae: AutoencoderKL | VQModel
    discriminator: Discriminator | None = None
    lpips: LPIPS | None = None
    loss: FirstStageLoss = FirstStageLoss()
    dtype: str = "float32"
    """Of the autoencoder and the discriminator; losses, codebook and LPIPS are float32."""
    remat: bool = False
    """Compute norms and activations again on the way back, instead of keeping them."""

    @property
    def reduction(self) -> str:
        """Over an image's values: "sum" or "mean"."""
        return self.loss.reduction or ("mean" if isinstance(self.vae, VQModel) else "sum")

    def init(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Draw the params and the first `extra`."""
        side = 2 * self.vae.factor
        pixels = jnp.zeros((1, side, side, self.vae.in_channels))
        params: dict[str, Any] = {}
        params["vae"] = jax.jit(self.vae.init)(jax.random.fold_in(key, 0), pixels)["params"]
        if self.discriminator is not None:
            pixels = jnp.zeros((1, 64, 64, self.vae.out_channels))
            drawn = jax.jit(self.discriminator.init)(jax.random.fold_in(key, 1), pixels)
            params["discriminator"] = drawn["params"]
        if self.loss.learn_logvar:
            params["logvar"] = jnp.float32(self.loss.logvar_init)
        return params, self.first_extra(params)

    def first_extra(self, params: Params) -> Any:
        """The `extra` to start from with these params, such as a loaded checkpoint's."""
        if isinstance(self.vae, VQModel) and self.loss.ema_decay is not None:
            return vq.start(params["vae"]["quantize"]["embedding"]["embedding"])
        return ()

    def autoencoder(self, params: Params, extra: Any) -> Params:
        """The autoencoder's tree, its codebook taken from the averages where there are any."""
        if not isinstance(extra, vq.Averages):
            return params["vae"]
        return params["vae"] | {"quantize": {"embedding": {"embedding": vq.learnt(extra)}}}

    def check(self, height: int, width: int) -> None:
        """Refuse sizes of images that the networks cannot take, by an InputError."""
        factor, needed = self.vae.factor, {}
        if self.lpips is not None and self.loss.perceptual_weight > 0:
            needed["LPIPS"] = self.lpips.smallest
        if self.discriminator is not None:
            needed["the discriminator"] = self.discriminator.smallest
        for name, size in (("height", height), ("width", width)):
            if size % factor:
                near = max(size // factor, 1) * factor
                raise InputError(f"{name} must be a multiple of {factor}, got {size}: try {near}")
            for who, least in needed.items():
                if size < least:
                    raise InputError(f"{name} must be at least {least} for {who}, got {size}")

    def gradients(
        self,
        params: Params,
        extra: Any,
        frozen: Params,
        batch: Batch,
        keys: Key[Array, " b"],
        step: Int[Array, ""],
    ) -> Gradients:
        """See `Stage.gradients`.

        Metrics: loss (the generator's), nll, rec (mean absolute difference), psnr (dB, of clipped
        reconstructions, mean over images); kl, or codebook and perplexity (of the vectors' use, at
        most their number); perceptual; g_loss, d_weight, disc_loss, logits_real, logits_fake.
        """
        self.check(*batch["pixels"].shape[1:3])
        pixels = to_float(batch["pixels"])
        kept = frozen.get("vae", {})
        forward = functools.partial(self._forward, kept=kept, extra=extra, pixels=pixels, keys=keys)
        (made, regular), pull, (last, extra, metrics) = jax.vjp(
            forward, params["vae"], has_aux=True
        )
        logvar = params.get("logvar", jnp.float32(self.loss.logvar_init))
        likelihood = jax.value_and_grad(self._likelihood, (0, 1), has_aux=True)
        (nll, more), (towards, by_logvar) = likelihood(made, logvar, pixels, frozen)
        metrics |= more | {"nll": nll, "loss": nll + regular}

        grads: dict[str, Any] = {}
        if self.discriminator is not None:
            listen = step >= self.loss.disc_start
            arguments = (params["discriminator"], params["vae"], made, pixels, towards, last)
            adversarial, grads["discriminator"], more = jax.lax.cond(
                listen, self._adversarial, self._silence, *arguments
            )
            weight = self.loss.disc_factor * more["d_weight"]
            towards = towards + weight * adversarial
            metrics |= more | {"loss": metrics["loss"] + weight * more["g_loss"]}
        (grads["vae"],) = pull((towards, jnp.ones_like(regular)))
        if "logvar" in params:
            grads["logvar"] = by_logvar
        return Gradients(grads, extra, metrics)

    def reconstruct(
        self, params: Params, extra: Any, pixels: UInt8[Array, "b h w c"]
    ) -> UInt8[Array, "b h w c"]:
        """Encode and decode pixels, without a draw: what people look at."""
        tree = self.autoencoder(params, extra)
        z, _ = self.encode(tree, to_float(pixels))
        if isinstance(self.vae, VQModel):
            z = self._apply(tree, z, "lookup").z
        made = self._apply(tree, z.astype(self.dtype), "decode").astype(jnp.float32)
        return jnp.round(jnp.clip(made * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)

    def encode(self, vae: Params, pixels: Images) -> tuple[Latents, Latents | None]:
        """Mean and log-variance of the latents, or unquantised latents and None: float32."""
        out = self._apply(vae, pixels.astype(self.dtype), "encode")
        if isinstance(self.vae, VQModel):
            return out.astype(jnp.float32), None
        return out[0].astype(jnp.float32), out[1].astype(jnp.float32)

    def _apply(self, vae: Params, x: Array, method: str) -> Any:
        return self._remat(
            lambda vae, x: self.vae.apply({"params": vae}, x, method=method),
        )(vae, x)

    def _remat(self, function: Callable) -> Callable:
        return jax.checkpoint(function, policy=_keep) if self.remat else function

    def _forward(
        self, vae: Params, kept: Params, extra: Any, pixels: Images, keys: Key[Array, " b"]
    ) -> Any:
        """((reconstructions, weighted regulariser), (input of the last layer, extra, metrics))."""
        vae = self.autoencoder({"vae": {**kept, **vae}}, extra)
        mean, logvar = self.encode(vae, pixels)
        if logvar is None:
            found = self._apply(vae, mean, "lookup")
            z, loss = found.z, self.loss.codebook(found.codebook_loss, found.commitment_loss)
            regular = self.loss.codebook_weight * loss
            metrics = {"codebook": loss, "perplexity": self._perplexity(found.ids)}
            if isinstance(extra, vq.Averages):
                assert self.loss.ema_decay is not None
                extra = vq.follow(extra, mean, found.ids, self.loss.ema_decay)
        else:
            z = draw(mean, logvar, latent_noise(keys, mean.shape[1:]))
            kl = self.loss.divergence(mean, logvar).mean()
            size = pixels[0].size if self.reduction == "mean" else 1
            regular, metrics = self.loss.kl_weight * kl / size, {"kl": kl}
        made, last = self._decode(vae, z)
        return (made, regular), (last, extra, metrics)

    def _perplexity(self, ids: Int[Array, "b p q"]) -> Scalar:
        assert isinstance(self.vae, VQModel)
        share = jnp.zeros(self.vae.num_vq_embeddings).at[ids.reshape(-1)].add(1 / ids.size)
        return jnp.exp(-jax.scipy.special.xlogy(share, share).sum())

    def _decode(self, vae: Params, z: Latents) -> tuple[Images, Any]:
        """Reconstructions, and what the decoder's last layer was given, if that is of use."""
        z = z.astype(self.dtype)
        if self.discriminator is None:
            return self._apply(vae, z, "decode").astype(jnp.float32), None

        def decode(vae: Params, z: Array) -> tuple[Array, Array]:
            made, seen = self.vae.apply(
                {"params": vae},
                z,
                method="decode",
                mutable=["intermediates"],
                capture_intermediates=lambda m, _: m.path == ("decoder", "conv_norm_out"),
            )
            return made, seen["intermediates"]["decoder"]["conv_norm_out"]["__call__"][0]

        made, last = self._remat(decode)(vae, z)
        return made.astype(jnp.float32), last.astype(jnp.float32)

    def _likelihood(
        self, made: Images, logvar: Scalar, pixels: Images, frozen: Params
    ) -> tuple[Scalar, Metrics]:
        """(Mean over images of the negative log-likelihood, metrics)."""
        mse = jnp.square(pixels - jnp.clip(made, -1, 1)).mean((1, 2, 3))
        psnr = 10 * jnp.log10(4 / jnp.maximum(mse, 1e-10)).mean()
        metrics = {"rec": jnp.abs(pixels - made).mean(), "psnr": psnr}
        distance: Any = None
        if self.lpips is not None and self.loss.perceptual_weight > 0:
            distance = self.lpips.apply({"params": frozen["lpips"]}, pixels, made)
            metrics["perceptual"] = distance.mean()
        return self.loss.likelihood(pixels, made, distance, logvar, self.reduction), metrics

    def _adversarial(
        self, disc: Params, vae: Params, made: Images, pixels: Images, towards: Images, last: Array
    ) -> tuple[Images, Params, Metrics]:
        """(Gradient of g_loss by the reconstructions, the discriminator's gradients, metrics).

        `towards` is the likelihood's gradient by the reconstructions: with `last`, the last layer's
        input, both gradients by its kernel follow without the network behind it.
        """
        assert self.discriminator is not None
        network = self.discriminator

        def judge(disc: Params, x: Images) -> Float[Array, "b p q 1"]:
            logits: Any = network.apply({"params": disc}, x.astype(self.dtype))
            return logits.astype(jnp.float32)

        fake, back = jax.vjp(judge, disc, made)
        real, back_real = jax.vjp(lambda disc: judge(disc, pixels), disc)
        _, adversarial = back(jnp.full_like(fake, -1 / fake.size))
        value, (by_real, by_fake) = jax.value_and_grad(self.loss.judgement, (0, 1))(real, fake)
        grads = jax.tree.map(jnp.add, back_real(by_real)[0], back(by_fake)[0])

        by_kernel = functools.partial(_last_norm, last, vae["decoder"]["conv_out"]["kernel"])
        weight = by_kernel(towards) / (by_kernel(adversarial) + 1e-4)
        weight = jnp.clip(weight, 0.0, 1e4) * self.loss.disc_weight
        metrics = {"g_loss": -fake.mean(), "d_weight": weight, "disc_loss": value}
        return (
            adversarial,
            grads,
            metrics | {"logits_real": real.mean(), "logits_fake": fake.mean()},
        )

    def _silence(
        self, disc: Params, vae: Params, made: Images, pixels: Images, towards: Images, last: Array
    ) -> tuple[Images, Params, Metrics]:
        """What `_adversarial` gives where nobody listens."""
        names = ("g_loss", "d_weight", "disc_loss", "logits_real", "logits_fake")
        zeros = jax.tree.map(jnp.zeros_like, disc)
        return jnp.zeros_like(made), zeros, {name: jnp.float32(0) for name in names}


def split(vae: Params) -> tuple[Params, Params]:
    """An autoencoder's tree as what follows its latents, and the rest, which makes them."""
    after = ("decoder", "post_quant_conv")
    return (
        {name: tree for name, tree in vae.items() if name in after},
        {name: tree for name, tree in vae.items() if name not in after},
    )


def to_float(pixels: UInt8[Array, "b h w c"]) -> Images:
    """0..255 to -1..1."""
    return jnp.asarray(pixels).astype(jnp.float32) / 127.5 - 1


def latent_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Latents:
    """Unit noise of one shape an image, from the image's own key."""
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, LATENT_NOISE), shape, jnp.float32)
    )(keys)


def measure_scale(
    stage: FirstStage,
    params: Params,
    batches: Iterable[Batch],
    *,
    extra: Any = (),
    seed: int = 0,
) -> float:
    """1/std of drawn latents: the `scaling_factor` of this autoencoder on this data.

    Rombach et al. 2022, section 4.3.2 and appendix G: the latent diffusion model sees latents of
    unit deviation. One number for all channels, by all values of all batches; of a codebook's
    autoencoder, the latents before they are quantised.

    Raises:
        InputError: no batches.
    """

    @jax.jit
    def moments(vae: Params, pixels: Array, keys: Array) -> Array:
        mean, logvar = stage.encode(vae, to_float(pixels))
        z = mean
        if logvar is not None:
            z = draw(mean, logvar, latent_noise(keys, mean.shape[1:]))
        return jnp.stack([z.mean(), jnp.square(z - z.mean()).mean()])

    found = []
    tree = stage.autoencoder(params, extra)
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        pixels = batch["pixels"]
        values = moments(tree, pixels, jax.random.split(key, len(pixels)))
        found.append((len(pixels), *np.asarray(values, np.float64)))
    if not found:
        raise InputError("latent scaling is measured from batches, and there are none: give some")
    count, means, variances = np.array(found).T
    mean = np.average(means, weights=count)
    variance = np.average(variances + np.square(means - mean), weights=count)
    return float(1 / np.sqrt(variance))


def _last_norm(last: Array, kernel: Array, towards: Images) -> Scalar:
    """Norm of the gradient by the last kernel, of what has the gradient `towards` by its output."""
    pull = jax.linear_transpose(lambda k: direct(last, k, 1, ((1, 1), (1, 1))), kernel)
    return jnp.linalg.norm(pull(towards)[0].reshape(-1))


def _keep(primitive: Any, *_: Any, **more: Any) -> bool:
    """Keep what is dear to compute: convolutions, and products of weights with activations."""
    if primitive.name == "dot_general":
        return not more["dimension_numbers"][1][0]
    return primitive.name in ("custom_jvp_call", "conv_general_dilated")
