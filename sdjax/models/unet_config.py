"""What a UNet is built of, and the weights that it asks for: all that needs no jax."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from sdjax.models import unet_reading
from sdjax.models.weights import (
    Shapes,
    conv,
    linear,
    listed,
    norm,
    resample,
    resnet,
    table,
    tree,
)

T = TypeVar("T", bound="UNetConfig")


@dataclass(frozen=True)
class Block:
    """What one block is built of; a hashable part of its module.

    `depths` counts the transformer blocks after each residual block; it is empty in the blocks
    without attention ("DownBlock2D", "UpBlock2D").
    """

    channels: int
    layers: int
    groups: int
    epsilon: float
    depths: tuple[int, ...] = ()
    heads: int = 1
    linear: bool = False
    only_cross: bool = False
    scale: float = 1.0


# Not frozen, since Linen's dataclasses inherit it, and without a repr in place of theirs.
@dataclass(unsafe_hash=True, repr=False)
class UNetConfig:
    """A UNet's fields, named as in diffusers' config.json, per-block values as tuples.

    `attention_head_dim` holds the *number* of heads, diffusers' historical misnomer.
    """

    block_out_channels: tuple[int, ...]
    down_block_types: tuple[str, ...]
    up_block_types: tuple[str, ...]
    layers_per_block: tuple[int, ...]
    attention_head_dim: tuple[int, ...]
    cross_attention_dim: int
    transformer_layers_per_block: tuple[int | tuple[int, ...], ...]
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None
    only_cross_attention: tuple[bool, ...]
    mid_block_type: str | None
    in_channels: int
    out_channels: int
    sample_size: int | tuple[int, ...] | None
    norm_num_groups: int
    norm_eps: float
    use_linear_projection: bool
    upcast_attention: bool
    flip_sin_to_cos: bool
    freq_shift: float
    center_input_sample: bool
    downsample_padding: int
    mid_block_scale_factor: float
    conv_in_kernel: int
    conv_out_kernel: int
    time_embedding_dim: int | None
    time_cond_proj_dim: int | None
    num_class_embeds: int | None
    addition_embed_type: str | None
    addition_time_embed_dim: int | None
    projection_class_embeddings_input_dim: int | None

    kind: ClassVar[str] = "UNet"

    @classmethod
    def from_config(cls: type[T], config: Mapping[str, Any]) -> T:
        """Build from config.json's content; InputError names the key that cannot be."""
        return cls(**unet_reading.read(config))

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return unet_reading.write(self)

    def shapes(self) -> Shapes:
        """Return the shape of every weight by its torch key."""
        return _shapes(self)

    def block(self, level: int, up: bool = False) -> Block:
        """Describe the down or up block at a level (0 is the largest size)."""
        layers = self.layers_per_block[level] + up
        depths: int | tuple[int, ...] = self.transformer_layers_per_block[level]
        kind = self.down_block_types[level]
        if up:
            place = len(self.block_out_channels) - 1 - level
            kind = self.up_block_types[place]
            if self.reverse_transformer_layers_per_block is not None:
                depths = self.reverse_transformer_layers_per_block[place]
        depths = (depths,) * layers if isinstance(depths, int) else depths
        return Block(
            channels=self.block_out_channels[level],
            layers=layers,
            groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            depths=depths if kind.startswith("CrossAttn") else (),
            heads=self.attention_head_dim[level],
            linear=self.use_linear_projection,
            only_cross=self.only_cross_attention[level],
        )

    def middle(self) -> Block | None:
        """Describe the middle block, if there is one: its self-attention is always that."""
        if self.mid_block_type is None:
            return None
        depth = self.transformer_layers_per_block[-1]
        depth = depth if isinstance(depth, int) else depth[0]
        depths = (depth,) if self.mid_block_type == unet_reading.MID[0] else ()
        return Block(
            channels=self.block_out_channels[-1],
            layers=1 + len(depths),
            groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            depths=depths,
            heads=self.attention_head_dim[-1],
            linear=self.use_linear_projection,
            scale=self.mid_block_scale_factor,
        )

    @property
    def time_features(self) -> int:
        """The width of the time embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


def _shapes(unet: UNetConfig) -> Shapes:
    time, last = unet.time_features, len(unet.block_out_channels) - 1
    width = unet.block_out_channels[0]
    parts = {"conv_in": conv(unet.in_channels, width, unet.conv_in_kernel)}
    parts["time_embedding"] = _embedding(width, time, unet.time_cond_proj_dim)
    if unet.num_class_embeds is not None:
        parts["class_embedding"] = table(unet.num_class_embeds, time)
    if unet.addition_embed_type is not None:
        assert unet.projection_class_embeddings_input_dim is not None  # from_config refuses it
        parts["add_embedding"] = _embedding(unet.projection_class_embeddings_input_dim, time)
    skips, downs, ups = [width], [], []
    for level in range(last + 1):
        block = unet.block(level)
        inputs = [width] + [block.channels] * (block.layers - 1)
        downs.append(_block(unet, block, inputs) | _resampler("downsamplers", block, level < last))
        width = block.channels
        skips += [width] * (block.layers + (level < last))
    middle = unet.middle()
    if middle is not None:
        parts["mid_block"] = _block(unet, middle, [width] * middle.layers)
    for place in range(last + 1):
        block = unet.block(last - place, up=True)
        inputs = []
        for _ in range(block.layers):
            inputs.append(width + skips.pop())
            width = block.channels
        ups.append(_block(unet, block, inputs) | _resampler("upsamplers", block, place < last))
    parts |= listed("down_blocks", downs) | listed("up_blocks", ups)
    parts["conv_norm_out"] = norm(width)
    parts["conv_out"] = conv(width, unet.out_channels, unet.conv_out_kernel)
    return tree(parts)


def _embedding(inputs: int, outputs: int, condition: int | None = None) -> Shapes:
    parts = {"linear_1": linear(inputs, outputs), "linear_2": linear(outputs, outputs)}
    if condition is not None:
        parts["cond_proj"] = linear(condition, inputs, bias=False)
    return tree(parts)


def _block(unet: UNetConfig, block: Block, inputs: list[int]) -> Shapes:
    """The residual blocks, of so many input channels each, and their transformers."""
    resnets = [resnet(width, block.channels, unet.time_features) for width in inputs]
    transformers = [_transformer(unet, block, depth) for depth in block.depths]
    return tree(listed("resnets", resnets) | listed("attentions", transformers))


def _resampler(name: str, block: Block, there: bool) -> Shapes:
    return tree(listed(name, [resample(block.channels)] if there else []))


def _transformer(unet: UNetConfig, block: Block, depth: int) -> Shapes:
    width, text = block.channels, unet.cross_attention_dim
    outer = linear(width, width) if block.linear else conv(width, width, 1)
    inner = tree(
        {
            "norm1": norm(width),
            "attn1": _attention(width, text if block.only_cross else width),
            "norm2": norm(width),
            "attn2": _attention(width, text),
            "norm3": norm(width),
            "ff.net.0.proj": linear(width, 8 * width),
            "ff.net.2": linear(4 * width, width),
        }
    )
    blocks = listed("transformer_blocks", [inner] * depth)
    return tree({"norm": norm(width), "proj_in": outer, **blocks, "proj_out": outer})


def _attention(width: int, context: int) -> Shapes:
    parts = {"to_q": linear(width, width, bias=False), "to_out.0": linear(width, width)}
    parts |= {name: linear(context, width, bias=False) for name in ("to_k", "to_v")}
    return tree(parts)
