"""The names that CompVis gave the UNet and the autoencoder, and those that diffusers gave them.

Both are trees of the same modules, numbered differently: CompVis counts every stage of the UNet in
one list (`input_blocks.4.1`), diffusers by resolution and kind (`down_blocks.1.attentions.0`). A
`Table` lists module prefixes side by side, built from a diffusers config; `rename` applies it in
either direction. Source: the state dicts of github.com/CompVis/stable-diffusion and
github.com/Stability-AI/generative-models (`openaimodel.UNetModel`, `model.Encoder`, `Decoder`).
"""

from collections.abc import Mapping
from typing import Any

Table = dict[str, str]
"""Diffusers' module prefix to the single file's, at module borders."""

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def rename(key: str, table: Mapping[str, str]) -> str | None:
    """The key under its other name, by the longest prefix that the table has; None if it has none.

    A prefix ends at a dot or at the key's end.
    """
    head = key
    while head:
        if head in table:
            return table[head] + key[len(head) :]
        head = head.rpartition(".")[0]
    return None


def inverse(table: Table) -> Table:
    """The single file's prefixes to diffusers'."""
    return {theirs: ours for ours, theirs in table.items()}


def unet(config: Mapping[str, Any]) -> Table:
    """The table of a UNet2DConditionModel's config."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if config.get("addition_embed_type") == "text_time":
        table |= {
            "add_embedding.linear_1": "label_emb.0.0",
            "add_embedding.linear_2": "label_emb.0.2",
        }
    elif config.get("class_embed_type") in ("timestep", "projection"):
        table |= {
            "class_embedding.linear_1": "label_emb.0.0",
            "class_embedding.linear_2": "label_emb.0.2",
        }
    elif config.get("num_class_embeds") is not None:
        table["class_embedding"] = "label_emb"
    table |= _inner("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    table |= _inner("mid_block.resnets.1", "middle_block.2", UNET_RESNET)

    down, up = config["down_block_types"], config["up_block_types"]
    layers = _layers(config, len(down))
    at = 1
    for block, kind in enumerate(down):
        for layer in range(layers[block]):
            ours, theirs = f"down_blocks.{block}", f"input_blocks.{at}"
            table |= _inner(f"{ours}.resnets.{layer}", f"{theirs}.0", UNET_RESNET)
            if "CrossAttn" in kind:
                table[f"{ours}.attentions.{layer}"] = f"{theirs}.1"
            at += 1
        if block < len(down) - 1:
            table[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{at}.0.op"
            at += 1
    at = 0
    for block, kind in enumerate(up):
        attends = "CrossAttn" in kind
        depth = layers[len(up) - 1 - block] + 1
        for layer in range(depth):
            ours, theirs = f"up_blocks.{block}", f"output_blocks.{at}"
            table |= _inner(f"{ours}.resnets.{layer}", f"{theirs}.0", UNET_RESNET)
            if attends:
                table[f"{ours}.attentions.{layer}"] = f"{theirs}.1"
            if layer == depth - 1 and block < len(up) - 1:
                # The upsampler closes the stage, after the attention where there is one.
                table[f"{ours}.upsamplers.0.conv"] = f"{theirs}.{2 if attends else 1}.conv"
            at += 1
    return table


def vae(config: Mapping[str, Any]) -> Table:
    """The table of an AutoencoderKL's config; the decoder counts its stages from the image."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    blocks = len(config["block_out_channels"])
    layers = _layers(config, blocks)
    for half in ("encoder", "decoder"):
        for name, theirs in (
            ("conv_in", "conv_in"),
            ("conv_norm_out", "norm_out"),
            ("conv_out", "conv_out"),
        ):
            table[f"{half}.{name}"] = f"{half}.{theirs}"
        for i in (0, 1):
            table |= _inner(
                f"{half}.mid_block.resnets.{i}", f"{half}.mid.block_{i + 1}", VAE_RESNET
            )
        table |= _inner(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
    for block in range(blocks):
        ours, theirs = f"encoder.down_blocks.{block}", f"encoder.down.{block}"
        for layer in range(layers[block]):
            table |= _inner(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", VAE_RESNET)
        table[f"{ours}.downsamplers.0.conv"] = f"{theirs}.downsample.conv"
        ours, theirs = f"decoder.up_blocks.{block}", f"decoder.up.{blocks - 1 - block}"
        for layer in range(layers[block] + 1):
            table |= _inner(f"{ours}.resnets.{layer}", f"{theirs}.block.{layer}", VAE_RESNET)
        table[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    return table


def is_vae_projection(key: str) -> bool:
    """Whether a diffusers key is a linear map that CompVis stores as a 1x1 convolution."""
    return ".attentions.0.to_" in key and key.endswith(".weight")


def _inner(ours: str, theirs: str, names: Mapping[str, str]) -> Table:
    return {f"{ours}.{a}": f"{theirs}.{b}" for a, b in names.items()}


def _layers(config: Mapping[str, Any], blocks: int) -> list[int]:
    layers = config.get("layers_per_block", 2)
    return [layers] * blocks if isinstance(layers, int) else list(layers)
