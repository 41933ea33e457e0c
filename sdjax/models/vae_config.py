"""An autoencoder's config.json: what is read, what is refused, what weights it asks for; no jax."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from sdjax.models.fields import MAX_LAYERS, MAX_PARAMETERS, MAX_VOCABULARY, Fields, values
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

MAX_PARTS = 256
"""Residual blocks of one autoencoder; Stable Diffusion's has 22."""

T = TypeVar("T", bound="VAEConfig")
Q = TypeVar("Q", bound="VQConfig")


@dataclass(unsafe_hash=True, repr=False)
class VAEConfig:
    """A KL autoencoder's fields, named as in diffusers' config.json."""

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

    kind: ClassVar[str] = "AutoencoderKL"

    @classmethod
    def from_config(cls: type[T], config: Mapping[str, Any]) -> T:
        """Build from config.json's content; InputError names the key that cannot be."""
        return cls(**_read(Fields(cls.kind, config)))

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return _written(self)

    def shapes(self) -> Shapes:
        """Return the shape of every weight by its torch key."""
        z = self.latent_channels
        parts = {"encoder": _encoder(self, 2 * z), "decoder": _decoder(self)}
        if self.use_quant_conv:
            parts["quant_conv"] = conv(2 * z, 2 * z, 1)
        if self.use_post_quant_conv:
            parts["post_quant_conv"] = conv(z, z, 1)
        return tree(parts)

    @property
    def factor(self) -> int:
        """How many pixels one latent spans in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(unsafe_hash=True, repr=False)
class VQConfig:
    """A VQ autoencoder's fields, named as in diffusers' config.json."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    in_channels: int
    out_channels: int
    latent_channels: int
    vq_embed_dim: int
    num_vq_embeddings: int
    scaling_factor: float
    sample_size: int
    force_upcast: bool
    lookup_from_codebook: bool
    mid_block_add_attention: bool

    kind: ClassVar[str] = "VQModel"

    @classmethod
    def from_config(cls: type[Q], config: Mapping[str, Any]) -> Q:
        """Build from config.json's content; InputError names the key that cannot be."""
        fields = Fields(cls.kind, {"latent_channels": 3, "force_upcast": False} | dict(config))
        fields.choice("norm_type", "group", ("group",))
        read = _read(fields)
        width = fields.optional_integer("vq_embed_dim")
        return cls(
            **{key: value for key, value in read.items() if key in cls.__dataclass_fields__},
            vq_embed_dim=read["latent_channels"] if width is None else width,
            num_vq_embeddings=fields.integer("num_vq_embeddings", 256, high=MAX_VOCABULARY),
            lookup_from_codebook=fields.flag("lookup_from_codebook", False),
        )

    def config(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return _written(self) | {"norm_type": "group"}

    def shapes(self) -> Shapes:
        """Return the shape of every weight by its torch key."""
        z, width = self.latent_channels, self.vq_embed_dim
        parts = {"encoder": _encoder(self, z), "quant_conv": conv(z, width, 1)}
        parts["quantize.embedding"] = table(self.num_vq_embeddings, width)
        parts |= {"post_quant_conv": conv(width, z, 1), "decoder": _decoder(self)}
        return tree(parts)

    @property
    def factor(self) -> int:
        """How many pixels one latent spans in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


def _written(config: VAEConfig | VQConfig) -> dict[str, Any]:
    count = len(config.block_out_channels)
    written = {"_class_name": config.kind} | values(config)
    written["block_out_channels"] = list(config.block_out_channels)
    written["down_block_types"] = ["DownEncoderBlock2D"] * count
    written["up_block_types"] = ["UpDecoderBlock2D"] * count
    return written | {"act_fn": "silu"}


def _encoder(config: VAEConfig | VQConfig, outputs: int) -> Shapes:
    channels, blocks = config.block_out_channels, []
    width, last = channels[0], len(channels) - 1
    for i, channel in enumerate(channels):
        blocks.append(_block(width, channel, config.layers_per_block, "downsamplers", i < last))
        width = channel
    return tree(
        {
            "conv_in": conv(config.in_channels, channels[0]),
            **listed("down_blocks", blocks),
            "mid_block": _middle(width, config.mid_block_add_attention),
            "conv_norm_out": norm(width),
            "conv_out": conv(width, outputs),
        }
    )


def _decoder(config: VAEConfig | VQConfig) -> Shapes:
    channels, blocks = config.block_out_channels[::-1], []
    width, last = channels[0], len(channels) - 1
    for i, channel in enumerate(channels):
        layers = config.layers_per_block + 1
        blocks.append(_block(width, channel, layers, "upsamplers", i < last))
        width = channel
    return tree(
        {
            "conv_in": conv(config.latent_channels, channels[0]),
            "mid_block": _middle(channels[0], config.mid_block_add_attention),
            **listed("up_blocks", blocks),
            "conv_norm_out": norm(width),
            "conv_out": conv(width, config.out_channels),
        }
    )


def _block(inputs: int, outputs: int, layers: int, resampler: str, resampled: bool) -> Shapes:
    resnets = [resnet(inputs, outputs)] + [resnet(outputs, outputs)] * (layers - 1)
    after = [resample(outputs)] if resampled else []
    return tree(listed("resnets", resnets) | listed(resampler, after))


def _middle(width: int, attend: bool) -> Shapes:
    parts = listed("resnets", [resnet(width, width)] * 2)
    if attend:
        maps = {name: linear(width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")}
        parts["attentions.0"] = tree({"group_norm": norm(width), **maps})
    return tree(parts)


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
    found = {
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
    _check_sizes(fields, found)
    return found


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
