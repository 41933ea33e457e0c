"""The autoencoder between pixels and latents."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from sdjax.models.fields import MAX_LAYERS, MAX_PARAMETERS, Fields
from sdjax.models.layers import Conv
from sdjax.models.vae_blocks import Decoder, Encoder
from sdjax.types import Array

CLASS = "AutoencoderKL"
MAX_PARTS = 256
"""Residual blocks of one autoencoder; Stable Diffusion's has 22."""


class AutoencoderKL(nn.Module):
    """The variational autoencoder of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752).

    Pixels are in -1..1, latents unscaled: the diffusion model sees (z - shift) * scaling_factor.
    Fields are named as in diffusers' config.json; build it by `from_config`.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    in_channels: int
    out_channels: int
    latent_channels: int
    scaling_factor: float
    shift_factor: float | None
    sample_size: int
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AutoencoderKL":
        """Build the module from config.json's content; InputError names the key that cannot be."""
        return cls(**_read(Fields(CLASS, config)))

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        names = (key for key in self.__dataclass_fields__ if key not in ("parent", "name"))
        config: dict[str, Any] = {"_class_name": CLASS} | {key: getattr(self, key) for key in names}
        config["block_out_channels"] = list(self.block_out_channels)
        config["down_block_types"] = ["DownEncoderBlock2D"] * len(self.block_out_channels)
        config["up_block_types"] = ["UpDecoderBlock2D"] * len(self.block_out_channels)
        return config | {"act_fn": "silu"}

    @property
    def factor(self) -> int:
        """How many pixels one latent spans in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

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


def _read(fields: Fields) -> dict[str, Any]:
    down, up = ("DownEncoderBlock2D",), ("UpDecoderBlock2D",)
    count = len(fields.choices("down_block_types", down, down))
    kinds = fields.choices("up_block_types", up, up)
    if len(kinds) != count:
        raise fields.error("up_block_types", f"as long as 'down_block_types' ({count})", kinds)
    fields.choice("act_fn", "silu", ("silu", "swish"))
    fields.refuse("latents_mean", "latents_std")
    channels = fields.values.get("block_out_channels", (64,))
    if not isinstance(channels, list | tuple):
        raise fields.error("block_out_channels", f"a list of {count} integers", channels)
    shift = fields.values.get("shift_factor")
    values = {
        "block_out_channels": fields.integers("block_out_channels", channels, count),
        "layers_per_block": fields.integer("layers_per_block", 1, high=MAX_LAYERS),
        "norm_num_groups": fields.integer("norm_num_groups", 32),
        "in_channels": fields.integer("in_channels", 3),
        "out_channels": fields.integer("out_channels", 3),
        "latent_channels": fields.integer("latent_channels", 4),
        "scaling_factor": fields.number("scaling_factor", 0.18215, 1e-6, 1e6),
        "shift_factor": None if shift is None else fields.number("shift_factor", 0.0, -1e6, 1e6),
        "sample_size": fields.integer("sample_size", 32),
        "force_upcast": fields.flag("force_upcast", True),
        "use_quant_conv": fields.flag("use_quant_conv", True),
        "use_post_quant_conv": fields.flag("use_post_quant_conv", True),
        "mid_block_add_attention": fields.flag("mid_block_add_attention", True),
    }
    _check_sizes(fields, values)
    return values


def _check_sizes(fields: Fields, values: dict[str, Any]) -> None:
    channels, groups = values["block_out_channels"], values["norm_num_groups"]
    if any(width % groups for width in channels):
        wanted = f"multiples of 'norm_num_groups' ({groups})"
        raise fields.error("block_out_channels", wanted, list(channels))
    layers = 2 * values["layers_per_block"] + 1
    parts = layers * len(channels)
    parameters = 27 * layers * sum(width * max(channels) for width in channels)
    if parts > MAX_PARTS or parameters > MAX_PARAMETERS:
        wanted = (
            f"sizes of at most {MAX_PARTS} layers and {MAX_PARAMETERS:.0e} parameters in all"
            f" (these are about {parts} and {parameters:.0e})"
        )
        raise fields.error("block_out_channels", wanted, list(channels))
