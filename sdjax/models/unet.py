"""The UNet of Stable Diffusion 1, 2, XL, its refiner, inpainting and the x4 upscaler."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from sdjax.errors import InputError
from sdjax.models.layers import Conv, Embed, GroupNorm
from sdjax.models.unet_blocks import DownBlock, MidBlock, UpBlock
from sdjax.models.unet_config import UNetConfig
from sdjax.models.unet_time import TimestepEmbedding, sinusoids
from sdjax.models.unet_transformer import Projected
from sdjax.types import Array

Context = Float[Array, "b t d"] | Projected
"""Text states, or the tree that `project_context` made of them."""


class UNet(UNetConfig, nn.Module):
    """A network from noisy latents, time and text to noise (or v, or x0), NHWC.

    Rombach et al. 2022 (arXiv 2112.10752); Podell et al. 2023 (arXiv 2307.01952). Its fields are
    `UNetConfig`'s; build it by `from_config`.
    """

    def setup(self) -> None:
        """Name the parts as checkpoints do."""
        channels = self.block_out_channels
        time_features = self.time_features
        kernel = self.conv_in_kernel
        self.conv_in = Conv(channels[0], kernel_size=kernel, padding=kernel // 2)
        self.time_embedding = TimestepEmbedding(time_features)
        if self.num_class_embeds is not None:
            self.class_embedding = Embed(self.num_class_embeds, time_features)
        if self.addition_embed_type is not None:
            self.add_embedding = TimestepEmbedding(time_features)

        last = len(channels) - 1
        self.down_blocks = [
            DownBlock(self.block(i), downsample=i < last, padding=self.downsample_padding)
            for i in range(len(channels))
        ]
        middle = self.middle()
        self.mid_block = None if middle is None else MidBlock(middle)
        self.up_blocks = [
            UpBlock(self.block(last - i, up=True), upsample=i < last) for i in range(len(channels))
        ]

        self.conv_norm_out = GroupNorm(self.norm_num_groups, self.norm_eps, act="silu")
        kernel = self.conv_out_kernel
        self.conv_out = Conv(self.out_channels, kernel_size=kernel, padding=kernel // 2)

    def project_context(self, context: Float[Array, "b t d"]) -> Projected:
        """Return the keys and values of every attention that reads the text, as a nested dict.

        They do not depend on the time: compute them once, outside the loop over steps.
        """
        tree, context = {}, jnp.asarray(context)
        for i, down in enumerate(self.down_blocks):
            tree[f"down_blocks_{i}"] = down.project_context(context)
        if self.mid_block is not None:
            tree["mid_block"] = self.mid_block.project_context(context)
        for i, up in enumerate(self.up_blocks):
            tree[f"up_blocks_{i}"] = up.project_context(context)
        return tree

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        timestep: Float[Array, "*b"] | Int[Array, "*b"] | float | int,
        context: Context,
        *,
        added_text: Float[Array, "b p"] | None = None,
        added_time_ids: Float[Array, "b n"] | Int[Array, "b n"] | None = None,
        class_labels: Int[Array, "b"] | None = None,
        timestep_cond: Float[Array, "b g"] | None = None,
    ) -> Float[Array, "b h w c_out"]:
        """Return the prediction, [b, h, w, out_channels] in x's dtype.

        `timestep` is one for all or one an image, fractions allowed. SDXL wants `added_text`, the
        pooled text, and `added_time_ids`, six sizes and crops (the refiner: five with its score);
        the x4 upscaler wants `class_labels`, the noise level; LCM may take `timestep_cond`.
        Everything is computed in x's dtype, but for norms, softmax and the time embedding: float32.
        """
        x = jnp.asarray(x)
        if not isinstance(context, Mapping):
            context = self.project_context(context.astype(x.dtype))
        temb = self._time(x, timestep, timestep_cond)
        temb = temb + self._conditions(added_text, added_time_ids, class_labels)
        temb = jax.nn.silu(temb).astype(x.dtype)

        x = self.conv_in(2 * x - 1 if self.center_input_sample else x)
        skips = [x]
        for i, down in enumerate(self.down_blocks):
            x, outputs = down(x, temb, context[f"down_blocks_{i}"])
            skips.extend(outputs)
        if self.mid_block is not None:
            x = self.mid_block(x, temb, context["mid_block"])
        for i, up in enumerate(self.up_blocks):
            count = up.block.layers
            skips, own = skips[:-count], skips[-count:]
            _, h, w, _ = (skips[-1] if skips else x).shape
            x = up(x, tuple(own), temb, context[f"up_blocks_{i}"], (h, w))
        return self.conv_out(self.conv_norm_out(x))

    def _time(
        self,
        x: Float[Array, "b h w c"],
        timestep: Float[Array, "*b"] | Int[Array, "*b"] | float | int,
        condition: Float[Array, "b g"] | None,
    ) -> Float[Array, "b t"]:
        """Embed the time."""
        times = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), x.shape[:1])
        if self.time_cond_proj_dim is not None and condition is None:
            condition = jnp.zeros((x.shape[0], self.time_cond_proj_dim), jnp.float32)
        return self.time_embedding(self._waves(times, self.block_out_channels[0]), condition)

    def _conditions(
        self,
        added_text: Float[Array, "b p"] | None,
        added_time_ids: Float[Array, "b n"] | Int[Array, "b n"] | None,
        class_labels: Int[Array, "b"] | None,
    ) -> Float[Array, "b t"] | float:
        """Embed what this UNet knows beside time and text."""
        total: Float[Array, "b t"] | float = 0.0
        if self.num_class_embeds is not None:
            if class_labels is None:
                raise InputError("this UNet needs class_labels, the noise level of each image")
            total = total + self.class_embedding(jnp.asarray(class_labels)).astype(jnp.float32)
        if self.addition_embed_type is not None:
            if added_text is None or added_time_ids is None:
                raise InputError("this UNet needs added_text (pooled) and added_time_ids (sizes)")
            numbers = self._waves(added_time_ids, self.addition_time_embed_dim)
            numbers = numbers.reshape(added_text.shape[0], -1)
            text = added_text.astype(jnp.float32)
            total = total + self.add_embedding(jnp.concatenate([text, numbers], axis=-1))
        return total

    def _waves(
        self, values: Float[Array, "*n"] | Int[Array, "*n"], features: int | None
    ) -> Float[Array, "*n features"]:
        assert features is not None  # from_config refuses it
        return sinusoids(values, features, cos_first=self.flip_sin_to_cos, shift=self.freq_shift)
