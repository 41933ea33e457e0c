"""The autoencoder whose latents are vectors of a codebook."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Key

from sdjax.models.layers import Conv
from sdjax.models.vae_blocks import Decoder, Encoder
from sdjax.models.vae_config import VQConfig
from sdjax.types import Array


class Quantized(NamedTuple):
    """Latents on the codebook, and how far they were from it."""

    z: Float[Array, "b h w d"]
    """The nearest vectors; gradients pass straight through to what was quantised."""
    codebook_loss: Float[Array, " b"]
    """Mean squared distance an image, which moves the codebook only."""
    commitment_loss: Float[Array, " b"]
    """The same number, which moves the encoder only."""
    ids: Int[Array, "b h w"]


class VQModel(VQConfig, nn.Module):
    """The vector-quantised autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752).

    VQGAN's (Esser et al. 2021, arXiv 2012.09841), where the diffusion model sees latents before
    they are quantised, times `scaling_factor`. Pixels are in -1..1. Its fields are `VQConfig`'s;
    build it by `from_config`.
    """

    def setup(self) -> None:
        """Name the parts as checkpoints do."""
        shape = (self.block_out_channels, self.layers_per_block, self.norm_num_groups)
        self.encoder = Encoder(*shape, self.latent_channels, self.mid_block_add_attention)
        self.quant_conv = Conv(self.vq_embed_dim, kernel_size=1, padding=0)
        self.quantize = Quantizer(self.num_vq_embeddings, self.vq_embed_dim)
        self.post_quant_conv = Conv(self.latent_channels, kernel_size=1, padding=0)
        self.decoder = Decoder(*shape, self.out_channels, self.mid_block_add_attention)

    def encode(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        """Return latents that are not quantised yet."""
        return self.quant_conv(self.encoder(jnp.asarray(pixels)))

    def lookup(self, h: Float[Array, "b h w d"]) -> Quantized:
        """Return the codebook's vectors nearest to latents; computes in float32."""
        return self.quantize(jnp.asarray(h))

    def decode(self, z: Float[Array, "b h w d"]) -> Float[Array, "b H W c"]:
        """Return pixels of quantised latents, in -1..1 but not clipped to it.

        diffusers' `decode` quantises first: that is `decode(lookup(h).z)` here.
        """
        return self.decoder(self.post_quant_conv(jnp.asarray(z)))

    def __call__(self, pixels: Float[Array, "b H W c"]) -> Float[Array, "b H2 W2 c2"]:
        """Encode, quantise and decode; touches every parameter."""
        h = self.encode(pixels)
        return self.decode(self.lookup(h).z.astype(h.dtype))


class Quantizer(nn.Module):
    """A codebook of `num` vectors of `features` numbers."""

    num: int
    features: int

    @nn.compact
    def __call__(self, h: Float[Array, "b h w d"]) -> Quantized:
        """Return the nearest vectors."""
        return quantize(Codebook(self.num, self.features, name="embedding")(), h)


class Codebook(nn.Module):
    """The table itself, drawn from -1/num..1/num."""

    num: int
    features: int

    @nn.compact
    def __call__(self) -> Float[Array, "num features"]:
        """Return the table."""

        def init(key: Key[Array, ""], shape: tuple[int, int]) -> Float[Array, "num features"]:
            return jax.random.uniform(key, shape, minval=-1 / shape[0], maxval=1 / shape[0])

        return self.param("embedding", init, (self.num, self.features))


def quantize(codebook: Float[Array, "n d"], h: Float[Array, "b h w d"]) -> Quantized:
    """Replace latents by the codebook's nearest vectors.

    Nearest by squared distance; the gradient by the result is passed to h as it is (van den Oord et
    al. 2017, arXiv 1711.00937, equations 2 and 3). The decoder's loss does not move the codebook.
    """
    codebook, h = codebook.astype(jnp.float32), h.astype(jnp.float32)
    ids = nearest(codebook, h)
    e = jnp.take(codebook, ids, axis=0)
    return Quantized(
        z=h + lax.stop_gradient(e - h),
        codebook_loss=jnp.square(e - lax.stop_gradient(h)).mean((1, 2, 3)),
        commitment_loss=jnp.square(lax.stop_gradient(e) - h).mean((1, 2, 3)),
        ids=ids,
    )


def nearest(codebook: Float[Array, "n d"], h: Float[Array, "*b d"]) -> Int[Array, " *b"]:
    """The index of the vector nearest to each latent; the first of equals."""
    codebook, h = lax.stop_gradient(codebook), lax.stop_gradient(h)
    # |h|^2 is the same for all vectors. The order of near distances needs every bit of the product.
    product = jnp.matmul(h, codebook.T, precision=lax.Precision.HIGHEST)
    distances = jnp.square(codebook).sum(-1) - 2 * product
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


class Averages(NamedTuple):
    """Moving averages from which a codebook follows."""

    sizes: Float[Array, " n"]
    """How many latents a batch gives to each vector."""
    sums: Float[Array, "n d"]
    """Their sums."""


def start(codebook: Float[Array, "n d"]) -> Averages:
    """Averages as if each vector had been the nearest to one latent, itself."""
    return Averages(jnp.ones(len(codebook), jnp.float32), codebook.astype(jnp.float32))


def learnt(averages: Averages, epsilon: float = 1e-5) -> Float[Array, "n d"]:
    """The codebook: sums over sizes, these smoothed by Laplace's rule so that none is 0."""
    sizes = averages.sizes
    total = sizes.sum()
    smooth = (sizes + epsilon) / (total + len(sizes) * epsilon) * total
    return averages.sums / smooth[:, None]


def follow(
    averages: Averages, h: Float[Array, "b h w d"], ids: Int[Array, "b h w"], decay: float
) -> Averages:
    """Move the averages towards a batch: decay * old + (1 - decay) * new.

    Van den Oord et al. 2017 (arXiv 1711.00937), appendix A.1, equations 6 to 8.
    """
    h = lax.stop_gradient(h.astype(jnp.float32)).reshape(-1, h.shape[-1])
    count = len(averages.sizes)
    sizes = jnp.zeros(count).at[ids.reshape(-1)].add(1.0)
    sums = jnp.zeros((count, h.shape[-1])).at[ids.reshape(-1)].add(h)
    return Averages(
        decay * averages.sizes + (1 - decay) * sizes, decay * averages.sums + (1 - decay) * sums
    )
