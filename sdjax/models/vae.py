"""The autoencoder between pixels and latents."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from sdjax.models.layers import Conv
from sdjax.models.vae_blocks import Decoder, Encoder
from sdjax.models.vae_config import VAEConfig
from sdjax.types import Array


class AutoencoderKL(VAEConfig, nn.Module):
    """The variational autoencoder of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752).

    Pixels are in -1..1, latents unscaled: the diffusion model sees (z - shift) * scaling_factor.
    Its fields are `VAEConfig`'s; build it by `from_config`.
    """

    def setup(self) -> None:
        """Name the parts as checkpoints do."""
        shape = (self.block_out_channels, self.layers_per_block, self.norm_num_groups)
        moments = 2 * self.latent_channels
        self.encoder = Encoder(*shape, moments, self.mid_block_add_attention)
        self.decoder = Decoder(*shape, self.out_channels, self.mid_block_add_attention)
        if self.use_quant_conv:
            self.quant_conv = Conv(moments, kernel_size=1, padding=0)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, kernel_size=1, padding=0)

    def encode(
        self, pixels: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Return mean and log-variance of the latents, the latter clipped to -30..20."""
        moments = self.encoder(jnp.asarray(pixels))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W c"]:
        """Return pixels, in -1..1 but not clipped to it."""
        z = jnp.asarray(z)
        return self.decoder(self.post_quant_conv(z) if self.use_post_quant_conv else z)

    def __call__(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b H2 W2 c2"]:
        """Encode and decode the mean; touches every parameter."""
        return self.decode(self.encode(pixels)[0])


def draw(
    mean: Float[Array, "b h w z"],
    logvar: Float[Array, "b h w z"],
    noise: Float[Array, "b h w z"],
) -> Float[Array, "b h w z"]:
    """Draw latents from what `encode` returned, with unit noise."""
    return mean + jnp.exp(0.5 * logvar) * noise
