"""A UNet's config.json: what is read, what is refused, and how it is written back."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdjax.models.fields import MAX_LAYERS, MAX_PARAMETERS, Fields, collapsed, values

if TYPE_CHECKING:
    from sdjax.models.unet_config import UNetConfig

CLASS = "UNet2DConditionModel"
DOWN = ("CrossAttnDownBlock2D", "DownBlock2D")
UP = ("CrossAttnUpBlock2D", "UpBlock2D")
MID = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
MAX_PARTS = 512
"""Residual and transformer blocks of one UNet together; SDXL has 87."""


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the UNet's fields; keys that change nothing here (dropout, ...) are left alone."""
    fields = Fields(CLASS, config)
    _refuse(fields)
    down = fields.choices("down_block_types", DOWN[:1] * 3 + DOWN[1:], DOWN)
    count = len(down)
    up = fields.choices("up_block_types", UP[1:] + UP[:1] * 3, UP)
    if len(up) != count:
        raise fields.error("up_block_types", f"as long as 'down_block_types' ({count})", up)
    channels = config.get("block_out_channels", (320, 640, 1280, 1280))
    if not isinstance(channels, list | tuple):
        raise fields.error("block_out_channels", f"a list of {count} integers", channels)
    layers = fields.integers("layers_per_block", 2, count, high=MAX_LAYERS)
    depths, reverse = _depths(fields, layers)
    found = {
        "block_out_channels": fields.integers("block_out_channels", channels, count),
        "down_block_types": down,
        "up_block_types": up,
        "layers_per_block": layers,
        "attention_head_dim": fields.integers("attention_head_dim", 8, count),
        "cross_attention_dim": _context(fields, count),
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": reverse,
        "only_cross_attention": fields.flags("only_cross_attention", False, count),
        "mid_block_type": fields.choice("mid_block_type", MID[0], MID),
        "in_channels": fields.integer("in_channels", 4),
        "out_channels": fields.integer("out_channels", 4),
        "sample_size": sample_size(fields),
        "norm_num_groups": fields.integer("norm_num_groups", 32),
        "norm_eps": fields.number("norm_eps", 1e-5, 1e-12, 1.0),
        "use_linear_projection": fields.flag("use_linear_projection", False),
        "upcast_attention": fields.flag("upcast_attention", False),
        "flip_sin_to_cos": fields.flag("flip_sin_to_cos", True),
        "freq_shift": fields.number("freq_shift", 0.0, 0.0, 1.0),
        "center_input_sample": fields.flag("center_input_sample", False),
        "downsample_padding": fields.choice("downsample_padding", 1, (0, 1)),
        "mid_block_scale_factor": fields.number("mid_block_scale_factor", 1.0, 1e-3, 1e3),
        "conv_in_kernel": fields.choice("conv_in_kernel", 3, (1, 3, 5, 7)),
        "conv_out_kernel": fields.choice("conv_out_kernel", 3, (1, 3, 5, 7)),
        "time_embedding_dim": fields.optional_integer("time_embedding_dim"),
        "time_cond_proj_dim": fields.optional_integer("time_cond_proj_dim"),
        "num_class_embeds": fields.optional_integer("num_class_embeds"),
    }
    found |= _addition(fields)
    _check_sizes(fields, found)
    return found


def write(unet: "UNetConfig") -> dict[str, Any]:
    """Return the config.json of a UNet, per-block values as one where they are all equal."""
    config: dict[str, Any] = {"_class_name": CLASS} | values(unet)
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        config[key] = list(config[key])
    for key in (
        "layers_per_block",
        "attention_head_dim",
        "transformer_layers_per_block",
        "only_cross_attention",
    ):
        config[key] = collapsed(config[key])
    reverse = config["reverse_transformer_layers_per_block"]
    if reverse is not None:
        config["reverse_transformer_layers_per_block"] = [
            list(v) if isinstance(v, tuple) else v for v in reverse
        ]
        config["transformer_layers_per_block"] = [
            list(v) if isinstance(v, tuple) else v for v in unet.transformer_layers_per_block
        ]
    if isinstance(unet.sample_size, tuple):
        config["sample_size"] = list(unet.sample_size)
    config |= {"act_fn": "silu"}
    return config


def sample_size(fields: Fields) -> int | tuple[int, ...] | None:
    """Read the size at which the network was trained: one number, or height and width."""
    value = fields.values.get("sample_size")
    if isinstance(value, list | tuple):
        return fields.integers("sample_size", value, 2)
    return fields.optional_integer("sample_size")


def _refuse(fields: Fields) -> None:
    """Refuse what would change the computation and is not written here."""
    fields.refuse(
        "num_attention_heads",
        "dual_cross_attention",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "class_embed_type",
        "class_embeddings_concat",
        "time_embedding_act_fn",
        "timestep_post_act",
        "resnet_skip_time_act",
    )
    fields.choice("act_fn", "silu", ("silu", "swish"))
    fields.choice("attention_type", "default", ("default",))
    fields.choice("resnet_time_scale_shift", "default", ("default",))
    fields.choice("time_embedding_type", "positional", ("positional",))


def _context(fields: Fields, count: int) -> int:
    """Read the text states' width: the same for all blocks."""
    widths = fields.integers("cross_attention_dim", 1280, count)
    if len(set(widths)) > 1:
        raise fields.error("cross_attention_dim", "the same for all blocks", widths)
    return widths[0]


def _depths(fields: Fields, layers: tuple[int, ...]) -> tuple[tuple, tuple | None]:
    """Read the transformers' depths: one a block, or one for each of a block's layers.

    Lists inside the list need `reverse_...` for the way up, which has one layer more.
    """
    key, reverse_key = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    reverse = fields.values.get(reverse_key)
    depths = _nested(fields, key, fields.values.get(key, 1), layers)
    if reverse is None:
        if any(isinstance(d, tuple) for d in depths):
            raise fields.error(reverse_key, f"given where {key!r} holds lists", reverse)
        return depths, None
    above = tuple(n + 1 for n in reversed(layers))
    return depths, _nested(fields, reverse_key, reverse, above)


def _nested(
    fields: Fields, key: str, value: Any, layers: tuple[int, ...]
) -> tuple[int | tuple[int, ...], ...]:
    values = value if isinstance(value, list | tuple) else [value] * len(layers)
    if len(values) != len(layers):
        raise fields.error(key, f"one value, or a list of {len(layers)} (one a block)", value)
    read = []
    for inner, count in zip(values, layers, strict=True):
        numbers = Fields(fields.name, {key: inner}).integers(key, 1, count, 0, MAX_LAYERS)
        read.append(numbers if isinstance(inner, list | tuple) else numbers[0])
    return tuple(read)


def _addition(fields: Fields) -> dict[str, Any]:
    """Read SDXL's extra conditions: pooled text, sizes and crops."""
    kind = fields.choice("addition_embed_type", None, (None, "text_time"))
    keys = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    values = {key: fields.optional_integer(key) for key in keys}
    for key, value in values.items():
        if kind is not None and value is None:
            raise fields.error(key, f"an integer with 'addition_embed_type' {kind!r}", value)
    return {"addition_embed_type": kind} | values


def _check_sizes(fields: Fields, values: dict[str, Any]) -> None:
    """Check that groups and heads divide the channels, and that the whole could be a network."""
    channels, groups = values["block_out_channels"], values["norm_num_groups"]
    ups = values["up_block_types"][::-1]
    parts, parameters = 0, 0
    for level, width in enumerate(channels):
        if width % groups:
            wanted = f"multiples of 'norm_num_groups' ({groups})"
            raise fields.error("block_out_channels", wanted, list(channels))
        kinds = values["down_block_types"][level], ups[level]
        middle = level == len(channels) - 1 and values["mid_block_type"] == MID[0]
        heads = values["attention_head_dim"][level]
        if (middle or any(kind.startswith("CrossAttn") for kind in kinds)) and width % heads:
            wanted = f"a number of heads that divides the block's {width} channels"
            raise fields.error("attention_head_dim", wanted, heads)
        layers = 2 * values["layers_per_block"][level] + 1
        blocks = layers * _deepest(values, level)
        parts += layers + blocks
        above = channels[min(level + 1, len(channels) - 1)]
        parameters += 9 * width * layers * (2 * width + above)
        parameters += blocks * width * (16 * width + 2 * values["cross_attention_dim"])
    if parts > MAX_PARTS or parameters > MAX_PARAMETERS:
        wanted = (
            f"sizes of at most {MAX_PARTS} layers and {MAX_PARAMETERS:.0e} parameters in all"
            f" (these are about {parts} and {parameters:.0e})"
        )
        raise fields.error("block_out_channels", wanted, list(channels))


def _deepest(values: dict[str, Any], level: int) -> int:
    """Return the largest number of transformer blocks after one layer at this level."""
    reverse = values["reverse_transformer_layers_per_block"]
    own = [values["transformer_layers_per_block"][level]]
    own += [] if reverse is None else [reverse[::-1][level]]
    return max(max(d, default=0) if isinstance(d, tuple) else d for d in own)
