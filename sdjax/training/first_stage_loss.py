"""The loss of the first stage: hyper-parameters and formulas."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sdjax.errors import InputError
from sdjax.types import Array

Scalar = Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class FirstStageLoss:
    """Hyper-parameters of the first stage's loss, named as in CompVis's code.

    Rombach et al. 2022 (arXiv 2112.10752, appendix G) and Esser et al. 2021 (arXiv 2012.09841,
    equations 4 to 7); defaults are those of the published KL autoencoders' configs. An image's loss
    is the sum over its values of |x - y| + perceptual_weight * lpips(x, y), as a Laplace likelihood
    of log-scale `logvar`, plus kl_weight times its Kullback-Leibler divergence; with a codebook,
    the mean over its values, plus codebook_weight times the codebook's loss.
    """

    pixel_loss: str = "l1"
    """"l1" or "l2", the squared difference."""
    kl_weight: float = 1e-6
    perceptual_weight: float = 1.0
    disc_start: int = 50_001
    """The step from which the discriminator is trained and heard."""
    disc_weight: float = 0.5
    """Times the adaptive weight."""
    disc_factor: float = 1.0
    """Of both the generator's and the discriminator's share."""
    disc_loss: str = "hinge"
    """"hinge" or "vanilla", the logistic loss."""
    logvar_init: float = 0.0
    learn_logvar: bool = False
    """Train `logvar` too. CompVis declares it as a parameter, and gives it to no optimizer."""
    reduction: str | None = None
    """"sum" or "mean" over an image's values of likelihood and divergence; None as CompVis: "sum"
    for a KL autoencoder, "mean" with a codebook."""
    codebook_weight: float = 1.0
    beta: float = 0.25
    """Of the commitment loss."""
    legacy: bool = True
    """Give `beta` to the codebook's loss instead of the commitment's, as CompVis and diffusers do;
    False is the paper's (van den Oord et al. 2017, arXiv 1711.00937, equation 3)."""
    ema_decay: float | None = None
    """Where given (the paper: 0.99), the codebook follows moving averages of the latents instead of
    a gradient (1711.00937, appendix A.1), and the codebook's loss is beta times the commitment."""

    def __post_init__(self) -> None:
        """Refuse what does not exist, in one sentence."""
        for name, choices in (
            ("pixel_loss", ("l1", "l2")),
            ("disc_loss", ("hinge", "vanilla")),
            ("reduction", ("sum", "mean", None)),
        ):
            value = getattr(self, name)
            if value not in choices:
                wanted = " or ".join(repr(choice) for choice in choices)
                raise InputError(f"{name} must be {wanted}, got {value!r}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must be from 0 to below 1, got {self.ema_decay}")

    def likelihood(
        self,
        x: Float[Array, "b h w c"],
        y: Float[Array, "b h w c"],
        distance: Float[Array, " b"] | None,
        logvar: Scalar,
        reduction: str,
    ) -> Scalar:
        """Mean over images of the negative log-likelihood of x given its reconstruction y."""
        each = jnp.abs(x - y) if self.pixel_loss == "l1" else jnp.square(x - y)
        if distance is not None:
            each = each + self.perceptual_weight * distance[:, None, None, None]
        nll = (each / jnp.exp(logvar) + logvar).mean()
        return nll * x[0].size if reduction == "sum" else nll

    def divergence(
        self, mean: Float[Array, "b h w z"], logvar: Float[Array, "b h w z"]
    ) -> Float[Array, " b"]:
        """Of N(mean, exp(logvar)) from N(0, 1), summed over an image's latents."""
        return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3))

    def codebook(self, codebook: Float[Array, " b"], commitment: Float[Array, " b"]) -> Scalar:
        """The codebook's loss of the two that `models.vq.quantize` gives."""
        if self.ema_decay is not None:
            return self.beta * commitment.mean()
        if self.legacy:
            return (commitment + self.beta * codebook).mean()
        return (self.beta * commitment + codebook).mean()

    def judgement(self, real: Float[Array, "b p q 1"], fake: Float[Array, "b p q 1"]) -> Scalar:
        """The discriminator's loss."""
        if self.disc_loss == "hinge":
            value = 0.5 * (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean())
        else:
            value = 0.5 * (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean())
        return self.disc_factor * value
