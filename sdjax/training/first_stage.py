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
from sdjax.models.convolution import direct
from sdjax.models.vae import AutoencoderKL, draw
from sdjax.training.stage import Batch, Gradients
from sdjax.types import Array

LATENT_NOISE = 0
"""What an image's key is folded with for the draw of its latents."""

LAST = ("decoder", "conv_out", "kernel")
"""The decoder's last kernel, at which the adaptive weight compares gradients."""

Images = Float[Array, "b h w c"]
Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class FirstStageLoss:
    """Hyper-parameters of the first stage's loss, named as in CompVis's code.

    Rombach et al. 2022 (arXiv 2112.10752, appendix G) and Esser et al. 2021 (arXiv 2012.09841,
    equations 4 to 7); defaults are those of the published KL autoencoders' configs. An image's loss
    is the sum over its values of |x - y| + perceptual_weight * lpips(x, y), as a Laplace likelihood
    of log-scale `logvar`, plus kl_weight times its Kullback-Leibler divergence.
    """

    pixel_loss: str = "l1"
    """"l1" or "l2", the squared difference."""
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    disc_start: int = 50_001
    """The step from which the discriminator is trained and heard."""
    disc_weight: float = 0.5
    disc_factor: float = 1.0
    disc_loss: str = "hinge"
    """"hinge" or "vanilla", the logistic loss."""
    logvar_init: float = 0.0
    learn_logvar: bool = False
    """Train `logvar` too. CompVis declares it as a parameter, and gives it to no optimizer."""
    reduction: str = "sum"
    """"sum" over an image's values, as CompVis's KL loss; "mean" divides likelihood and divergence
    by the number of values, so that learning rates do not depend on the size of images."""

    def __post_init__(self) -> None:
        """Refuse names that do not exist, in one sentence."""
        for name, choices in (
            ("pixel_loss", ("l1", "l2")),
            ("disc_loss", ("hinge", "vanilla")),
            ("reduction", ("sum", "mean")),
        ):
            value = getattr(self, name)
            if value not in choices:
                wanted = " or ".join(repr(choice) for choice in choices)
                raise InputError(f"{name} must be {wanted}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """Training an autoencoder, with or without LPIPS and a discriminator.

    `params` holds "vae", "discriminator" where there is one, and "logvar" (a scalar) where it is
    learnt; `frozen` holds "lpips" where there is one; batches hold "pixels", uint8 [b, h, w, 3].

    One call gives both networks' gradients at the same reconstructions: the generator's for the
    autoencoder (and logvar), and for the discriminator those of its own loss, in which the
    reconstructions are constants. CompVis takes turns instead, so that its discriminator sees the
    reconstructions of an autoencoder one step older. Before `disc_start` the discriminator is not
    evaluated, and its gradients and metrics are 0.

    The loss of an image depends on no other, but for the discriminator, whose batch norm and
    adaptive weight are of the batch that a call is given.
    """

    vae: AutoencoderKL
    discriminator: Any = None
    """sdjax.models.discriminator.Discriminator, or None."""
    lpips: Any = None
    """sdjax.models.lpips.LPIPS, or None."""
    loss: FirstStageLoss = FirstStageLoss()
    dtype: str = "float32"
    remat: bool = False
    """Compute norms and activations again on the way back, instead of keeping them."""

    def init(self, key: Key[Array, ""]) -> tuple[Params, Any]:
        """Draw the params; `extra` is () for a KL autoencoder."""
        side = 2 * self.vae.factor
        pixels = jnp.zeros((1, side, side, self.vae.in_channels))
        params: dict[str, Any] = {}
        for number, name in enumerate(("vae", "discriminator")):
            module = getattr(self, name)
            if module is not None:
                drawn = jax.jit(module.init)(jax.random.fold_in(key, number), pixels)
                params[name] = drawn["params"]
        if self.loss.learn_logvar:
            params["logvar"] = jnp.float32(self.loss.logvar_init)
        return params, ()

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

        Metrics: loss (the generator's), nll, rec (mean absolute difference), psnr (of the clipped
        reconstruction, dB, mean over images), kl; perceptual; g_loss, d_weight, disc_loss,
        logits_real, logits_fake.
        """
        pixels = to_float(batch["pixels"])
        reconstruct = functools.partial(self._reconstruct, pixels=pixels, keys=keys)
        (made, regular), pull, (last, metrics) = jax.vjp(reconstruct, params["vae"], has_aux=True)

        logvar = params.get("logvar", jnp.float32(self.loss.logvar_init))
        likelihood = jax.value_and_grad(self._likelihood, (0, 1), has_aux=True)
        (nll, more), (towards, logvar_grad) = likelihood(made, logvar, pixels, frozen)
        metrics |= more | {"nll": nll, "loss": nll + regular}

        grads: dict[str, Any] = {}
        if self.discriminator is not None:
            arguments = (params["discriminator"], params["vae"], made, pixels, towards, last)
            hear = step >= self.loss.disc_start
            adversarial, grads["discriminator"], more = jax.lax.cond(
                hear, self._adversarial, self._silence, *arguments
            )
            weight = self.loss.disc_factor * more["d_weight"]
            towards = towards + weight * adversarial
            metrics |= more | {"loss": metrics["loss"] + weight * more["g_loss"]}
        (grads["vae"],) = pull((towards, jnp.ones_like(regular)))
        if self.loss.learn_logvar:
            grads["logvar"] = logvar_grad
        return Gradients(grads, extra, metrics)

    def reconstruct(
        self, params: Params, extra: Any, pixels: UInt8[Array, "b h w c"]
    ) -> UInt8[Array, "b h w c"]:
        """Encode and decode pixels, without a draw: what people look at."""
        z, _ = self.encode(params["vae"], to_float(pixels))
        made = self._apply(params["vae"], z.astype(self.dtype), "decode").astype(jnp.float32)
        return jnp.round(jnp.clip(made * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)

    def encode(
        self, vae: Params, pixels: Images
    ) -> tuple[Float[Array, "b p q z"], Float[Array, "b p q z"]]:
        """Mean and log-variance of the latents, float32."""
        mean, logvar = self._apply(vae, pixels.astype(self.dtype), "encode")
        return mean.astype(jnp.float32), logvar.astype(jnp.float32)

    def _apply(self, vae: Params, x: Any, method: str) -> Any:
        """One half of the autoencoder."""
        apply: Callable = lambda vae, x: self.vae.apply({"params": vae}, x, method=method)  # noqa: E731
        return self._remat(apply)(vae, x)

    def _remat(self, function: Callable) -> Callable:
        return jax.checkpoint(function, policy=_keep) if self.remat else function

    def _reconstruct(self, vae: Params, pixels: Images, keys: Key[Array, " b"]) -> Any:
        """((reconstructions, weighted regulariser), (input of the last layer, metrics))."""
        mean, logvar = self.encode(vae, pixels)
        z = draw(mean, logvar, latent_noise(keys, mean.shape[1:]))
        made, last = self._decode(vae, z)
        kl = kl_divergence(mean, logvar).mean()
        size = made[0].size if self.loss.reduction == "mean" else 1
        return (made, self.loss.kl_weight * kl / size), (last, {"kl": kl})

    def _decode(self, vae: Params, z: Float[Array, "b p q z"]) -> tuple[Images, Any]:
        """Reconstructions, and what the decoder's last layer was given, if that is of use."""
        z = z.astype(self.dtype)
        if self.discriminator is None:
            return self._apply(vae, z, "decode").astype(jnp.float32), None

        def decode(vae: Params, z: Any) -> Any:
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

    def _likelihood(self, made: Images, logvar: Scalar, pixels: Images, frozen: Params) -> Any:
        """(Mean over images of the negative log-likelihood, metrics)."""
        difference = jnp.abs(pixels - made)
        mse = jnp.square(pixels - jnp.clip(made, -1, 1)).mean((1, 2, 3))
        psnr = 10 * jnp.log10(4 / jnp.maximum(mse, 1e-10)).mean()
        metrics = {"rec": difference.mean(), "psnr": psnr}
        each = difference if self.loss.pixel_loss == "l1" else jnp.square(difference)
        if self.lpips is not None and self.loss.perceptual_weight > 0:
            distance = self.lpips.apply({"params": frozen["lpips"]}, pixels, made)
            each = each + self.loss.perceptual_weight * distance[:, None, None, None]
            metrics["perceptual"] = distance.mean()
        nll = (each / jnp.exp(logvar) + logvar).mean()
        if self.loss.reduction == "sum":
            nll = nll * made[0].size
        return nll, jax.tree.map(jax.lax.stop_gradient, metrics)

    def _adversarial(
        self, disc: Params, vae: Params, made: Images, pixels: Images, towards: Images, last: Any
    ) -> tuple[Images, Params, dict[str, Scalar]]:
        """(Gradient of g_loss by the reconstructions, the discriminator's gradients, metrics).

        `towards` is the likelihood's gradient by the reconstructions: with `last`, the last layer's
        input, both gradients by its kernel follow without the network behind it.
        """

        def judge(disc: Params, x: Images) -> Float[Array, "b p q 1"]:
            logits = self.discriminator.apply({"params": disc}, x.astype(self.dtype))
            return logits.astype(jnp.float32)

        fake, back = jax.vjp(judge, disc, made)
        real, back_real = jax.vjp(lambda disc: judge(disc, pixels), disc)
        _, adversarial = back(jnp.full_like(fake, -1 / fake.size))
        value, (by_real, by_fake) = jax.value_and_grad(self._judgement, (0, 1))(real, fake)
        grads = jax.tree.map(jnp.add, back_real(by_real)[0], back(by_fake)[0])

        by_kernel = functools.partial(_last_norm, last, functools.reduce(dict.get, LAST, vae))
        weight = by_kernel(towards) / (by_kernel(adversarial) + 1e-4)
        weight = jnp.clip(weight, 0.0, 1e4) * self.loss.disc_weight
        metrics = {"g_loss": -fake.mean(), "d_weight": weight, "disc_loss": value}
        return (
            adversarial,
            grads,
            metrics | {"logits_real": real.mean(), "logits_fake": fake.mean()},
        )

    def _silence(
        self, disc: Params, vae: Params, made: Images, pixels: Images, towards: Images, last: Any
    ) -> tuple[Images, Params, dict[str, Scalar]]:
        """What `_adversarial` gives where nobody listens."""
        names = ("g_loss", "d_weight", "disc_loss", "logits_real", "logits_fake")
        zeros = jax.tree.map(jnp.zeros_like, disc)
        return jnp.zeros_like(made), zeros, {name: jnp.float32(0) for name in names}

    def _judgement(self, real: Array, fake: Array) -> Scalar:
        """The discriminator's loss."""
        if self.loss.disc_loss == "hinge":
            value = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
        else:
            value = 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())
        return self.loss.disc_factor * value


def to_float(pixels: UInt8[Array, "b h w c"]) -> Images:
    """0..255 to -1..1."""
    return jnp.asarray(pixels).astype(jnp.float32) / 127.5 - 1


def latent_noise(keys: Key[Array, " b"], shape: tuple[int, ...]) -> Float[Array, "b h w z"]:
    """Unit noise of one shape an image, from the image's own key."""
    return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, LATENT_NOISE), shape, jnp.float32)
    )(keys)


def kl_divergence(
    mean: Float[Array, "b h w z"], logvar: Float[Array, "b h w z"]
) -> Float[Array, " b"]:
    """Of N(mean, exp(logvar)) from N(0, 1), summed over an image's latents."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3))


def measure_scale(
    stage: FirstStage, params: Params, batches: Iterable[Batch], *, seed: int = 0
) -> float:
    """1/std of drawn latents: the `scaling_factor` of this autoencoder on this data.

    Rombach et al. 2022, section 4.3.2 and appendix G: the latent diffusion model sees latents of
    unit deviation. One number for all channels, by all values of all batches.

    Raises:
        InputError: no batches.
    """

    @jax.jit
    def moments(vae: Params, pixels: Array, keys: Array) -> Array:
        mean, logvar = stage.encode(vae, to_float(pixels))
        z = draw(mean, logvar, latent_noise(keys, mean.shape[1:]))
        return jnp.stack([z.mean(), jnp.square(z - z.mean()).mean()])

    found = []
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        pixels = batch["pixels"]
        values = moments(params["vae"], pixels, jax.random.split(key, len(pixels)))
        found.append((len(pixels), *np.asarray(values, np.float64)))
    if not found:
        raise InputError("latent scaling is measured from batches, and there are none: give some")
    count, means, variances = np.array(found).T
    mean = np.average(means, weights=count)
    variance = np.average(variances + np.square(means - mean), weights=count)
    return float(1 / np.sqrt(variance))


def _last_norm(last: Any, kernel: Array, towards: Images) -> Scalar:
    """Norm of the gradient by the last kernel, of what has the gradient `towards` by its output."""
    pull = jax.linear_transpose(lambda k: direct(last, k, 1, ((1, 1), (1, 1))), kernel)
    return jnp.linalg.norm(pull(towards)[0].reshape(-1))


def _keep(primitive: Any, *_: Any, **more: Any) -> bool:
    """Keep what is dear to compute: convolutions, and products of weights with activations."""
    if primitive.name == "dot_general":
        return not more["dimension_numbers"][1][0]
    return primitive.name in ("custom_jvp_call", "conv_general_dilated")
