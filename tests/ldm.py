"""What CompVis', Stability's and OpenCLIP's own modules call their weights, and their shapes.

Each function walks the constructor of the module that it names, with the arguments of the published
YAML files, so that the names do not depend on the tables under test nor on a diffusers config.
"""

from sdjax.config import Configs, read

Shapes = dict[str, tuple[int, ...]]

V1 = dict(
    model_channels=320,
    channel_mult=(1, 2, 4, 4),
    attention_resolutions=(4, 2, 1),
    transformer_depth=1,
    context_dim=768,
)
V2 = V1 | dict(context_dim=1024, linear=True)
XL = dict(
    model_channels=320,
    channel_mult=(1, 2, 4),
    attention_resolutions=(4, 2),
    transformer_depth=(1, 2, 10),
    context_dim=2048,
    linear=True,
    adm_in_channels=2816,
)
REFINER = dict(
    model_channels=384,
    channel_mult=(1, 2, 4, 4),
    attention_resolutions=(4, 2),
    transformer_depth=4,
    context_dim=1280,
    linear=True,
    adm_in_channels=2560,
)
UPSCALER = dict(
    in_channels=7,
    model_channels=256,
    channel_mult=(1, 2, 2, 4),
    attention_resolutions=(2, 4, 8),
    transformer_depth=1,
    context_dim=1024,
    linear=True,
    num_classes=1000,
    disable_self_attentions=(True, True, True, False),
)


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name, channels):
    return affine(name, channels)


def res_block(name, channels, emb, out):
    keys = norm(f"{name}.in_layers.0", channels) | affine(
        f"{name}.in_layers.2", out, channels, 3, 3
    )
    keys |= affine(f"{name}.emb_layers.1", out, emb)
    keys |= norm(f"{name}.out_layers.0", out) | affine(f"{name}.out_layers.3", out, out, 3, 3)
    if channels != out:
        keys |= affine(f"{name}.skip_connection", out, channels, 1, 1)
    return keys


def spatial_transformer(name, c, depth, context, linear):
    one = () if linear else (1, 1)
    keys = norm(f"{name}.norm", c) | affine(f"{name}.proj_in", c, c, *one)
    for d in range(depth):
        block = f"{name}.transformer_blocks.{d}"
        for attn, width in (("attn1", c), ("attn2", context)):
            keys[f"{block}.{attn}.to_q.weight"] = (c, c)
            keys[f"{block}.{attn}.to_k.weight"] = (c, width)
            keys[f"{block}.{attn}.to_v.weight"] = (c, width)
            keys |= affine(f"{block}.{attn}.to_out.0", c, c)
        keys |= affine(f"{block}.ff.net.0.proj", 8 * c, c) | affine(f"{block}.ff.net.2", c, 4 * c)
        for i in (1, 2, 3):
            keys |= norm(f"{block}.norm{i}", c)
    return keys | affine(f"{name}.proj_out", c, c, *one)


def unet_model(
    model_channels,
    channel_mult,
    attention_resolutions,
    transformer_depth,
    context_dim,
    in_channels=4,
    num_res_blocks=2,
    linear=False,
    adm_in_channels=None,
    num_classes=None,
    disable_self_attentions=None,
) -> Shapes:
    """ldm.modules.diffusionmodules.openaimodel.UNetModel."""
    mc, emb = model_channels, 4 * model_channels
    depths = (
        (transformer_depth,) * len(channel_mult)
        if isinstance(transformer_depth, int)
        else transformer_depth
    )
    keys = affine("time_embed.0", emb, mc) | affine("time_embed.2", emb, emb)
    if adm_in_channels:
        keys |= affine("label_emb.0.0", emb, adm_in_channels) | affine("label_emb.0.2", emb, emb)
    if num_classes:
        keys["label_emb.weight"] = (num_classes, emb)
    keys |= affine("input_blocks.0.0", mc, in_channels, 3, 3)

    def attend(name, c, level):
        off = disable_self_attentions and disable_self_attentions[level]
        block = spatial_transformer(name, c, depths[level], context_dim, linear)
        if off:
            for key in block:
                if ".attn1.to_k" in key or ".attn1.to_v" in key:
                    block[key] = (c, context_dim)
        return block

    chans, ch, ds, at = [mc], mc, 1, 1
    for level, mult in enumerate(channel_mult):
        for _ in range(num_res_blocks):
            keys |= res_block(f"input_blocks.{at}.0", ch, emb, mult * mc)
            ch = mult * mc
            if ds in attention_resolutions:
                keys |= attend(f"input_blocks.{at}.1", ch, level)
            chans.append(ch)
            at += 1
        if level != len(channel_mult) - 1:
            keys |= affine(f"input_blocks.{at}.0.op", ch, ch, 3, 3)
            chans.append(ch)
            at += 1
            ds *= 2
    keys |= res_block("middle_block.0", ch, emb, ch)
    keys |= spatial_transformer("middle_block.1", ch, depths[-1], context_dim, linear)
    keys |= res_block("middle_block.2", ch, emb, ch)
    at = 0
    for level, mult in reversed(list(enumerate(channel_mult))):
        for i in range(num_res_blocks + 1):
            keys |= res_block(f"output_blocks.{at}.0", ch + chans.pop(), emb, mult * mc)
            ch, member = mult * mc, 1
            if ds in attention_resolutions:
                keys |= attend(f"output_blocks.{at}.1", ch, level)
                member = 2
            if level and i == num_res_blocks:
                keys |= affine(f"output_blocks.{at}.{member}.conv", ch, ch, 3, 3)
                ds //= 2
            at += 1
    return keys | norm("out.0", ch) | affine("out.2", 4, mc, 3, 3)


def resnet_block(name, channels, out):
    keys = norm(f"{name}.norm1", channels) | affine(f"{name}.conv1", out, channels, 3, 3)
    keys |= norm(f"{name}.norm2", out) | affine(f"{name}.conv2", out, out, 3, 3)
    if channels != out:
        keys |= affine(f"{name}.nin_shortcut", out, channels, 1, 1)
    return keys


def middle(name, c):
    keys = resnet_block(f"{name}.block_1", c, c) | resnet_block(f"{name}.block_2", c, c)
    keys |= norm(f"{name}.attn_1.norm", c)
    for part in ("q", "k", "v", "proj_out"):
        keys |= affine(f"{name}.attn_1.{part}", c, c, 1, 1)
    return keys


def autoencoder_kl(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=4) -> Shapes:
    """ldm.models.autoencoder.AutoencoderKL, without its loss."""
    widths, z = [ch * m for m in ch_mult], z_channels
    keys = affine("encoder.conv_in", ch, 3, 3, 3)
    at = ch
    for i, out in enumerate(widths):
        for j in range(num_res_blocks):
            keys |= resnet_block(f"encoder.down.{i}.block.{j}", at, out)
            at = out
        if i != len(widths) - 1:
            keys |= affine(f"encoder.down.{i}.downsample.conv", at, at, 3, 3)
    keys |= middle("encoder.mid", at) | norm("encoder.norm_out", at)
    keys |= affine("encoder.conv_out", 2 * z, at, 3, 3)
    keys |= affine("decoder.conv_in", at, z, 3, 3) | middle("decoder.mid", at)
    for i, out in reversed(list(enumerate(widths))):
        for j in range(num_res_blocks + 1):
            keys |= resnet_block(f"decoder.up.{i}.block.{j}", at, out)
            at = out
        if i != 0:
            keys |= affine(f"decoder.up.{i}.upsample.conv", at, at, 3, 3)
    keys |= norm("decoder.norm_out", at) | affine("decoder.conv_out", 3, at, 3, 3)
    return keys | affine("quant_conv", 2 * z, 2 * z, 1, 1) | affine("post_quant_conv", z, z, 1, 1)


def clip_text_model(width=768, layers=12, vocabulary=49408) -> Shapes:
    """transformers.CLIPTextModel, as it was named when Stable Diffusion 1 was published."""
    keys: Shapes = {
        "text_model.embeddings.token_embedding.weight": (vocabulary, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            keys |= affine(f"{layer}.self_attn.{part}", width, width)
        keys |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        keys |= affine(f"{layer}.mlp.fc1", 4 * width, width)
        keys |= affine(f"{layer}.mlp.fc2", width, 4 * width)
    return keys | norm("text_model.final_layer_norm", width)


def open_clip(width, layers, vocabulary=49408, projection=None) -> Shapes:
    """open_clip's text tower: torch.nn.MultiheadAttention fuses q, k and v."""
    keys: Shapes = {
        "positional_embedding": (77, width),
        "text_projection": (width, projection or width),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, width),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        keys |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        keys[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        keys[f"{block}.attn.in_proj_bias"] = (3 * width,)
        keys |= affine(f"{block}.attn.out_proj", width, width)
        keys |= affine(f"{block}.mlp.c_fc", 4 * width, width)
        keys |= affine(f"{block}.mlp.c_proj", width, 4 * width)
    return keys | norm("ln_final", width)


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}


UNET, VAE = "model.diffusion_model.", "first_stage_model."


def checkpoint(name: str, tiny: bool = False, short: bool = False) -> Shapes:
    """A published checkpoint's weights, by the name of its shipped config.

    A tiny one has its structure with narrow layers; a short one is tiny, with fewer of them.
    """
    tiny = tiny or short
    clip_l = clip_text_model(12, 2, 50) if tiny else clip_text_model()
    clip_h = open_clip(16, 3, 50) if tiny else open_clip(1024, 24)
    big_g = open_clip(16, 2, 50) if tiny else open_clip(1280, 32)
    text1 = under("cond_stage_model.transformer.", clip_l)
    text2 = under("cond_stage_model.model.", clip_h)
    text_xl = under("conditioner.embedders.0.transformer.", clip_l)
    text_xl |= under("conditioner.embedders.1.model.", big_g)
    nets = {
        "sd1": (V1, text1),
        "sd1-inpaint": (V1 | dict(in_channels=9), text1),
        "sd2": (V2, text2),
        "sd2-base": (V2, text2),
        "sd2-inpaint": (V2 | dict(in_channels=9), text2),
        "sdxl": (XL, text_xl),
        "sdxl-inpaint": (XL | dict(in_channels=9), text_xl),
        "sdxl-refiner": (REFINER, under("conditioner.embedders.0.model.", big_g)),
        "x4-upscaler": (UPSCALER, text2),
    }
    unet, text = nets[name]
    vae = dict(ch_mult=(1, 2, 4) if name == "x4-upscaler" else (1, 2, 4, 4))
    if tiny:
        unet = unet | TINY[unet["context_dim"]] | dict(model_channels=8)
        vae |= dict(ch=8)
    if short:
        unet = unet | SHORT[name.removesuffix("-inpaint")] | dict(num_res_blocks=1)
        vae |= dict(ch_mult=(1, 2), num_res_blocks=1)
    return under(UNET, unet_model(**unet)) | under(VAE, autoencoder_kl(**vae)) | text


TINY = {
    768: dict(context_dim=12),
    1024: dict(context_dim=16),
    2048: dict(context_dim=28, adm_in_channels=40, transformer_depth=(1, 2, 3)),
    1280: dict(context_dim=16, adm_in_channels=36, transformer_depth=2),
}
"""Arguments of a tiny UNet, by the context width of the published one."""

SHORT = {
    "sd1": dict(channel_mult=(1, 2), attention_resolutions=(1,)),
    "sd2": dict(channel_mult=(1, 2), attention_resolutions=(1,)),
    "sd2-base": dict(channel_mult=(1, 2), attention_resolutions=(1,)),
    "sdxl": dict(channel_mult=(1, 2), attention_resolutions=(2,), transformer_depth=(1, 2)),
    "sdxl-refiner": dict(channel_mult=(1, 2, 4), attention_resolutions=(2,)),
    "x4-upscaler": dict(
        channel_mult=(1, 2, 2), attention_resolutions=(2, 4), disable_self_attentions=(1, 1, 0)
    ),
}
"""Arguments of a short UNet."""


def tiny_configs(name: str, short: bool = False) -> Configs:
    """The diffusers configs of a tiny or short checkpoint."""
    tables = read(name)
    unet, vae = tables["unet"], tables["vae"]
    small = TINY[unet["cross_attention_dim"]]
    widths = unet["block_out_channels"]
    unet["block_out_channels"] = [w * 8 // widths[0] for w in widths]
    unet["cross_attention_dim"] = small["context_dim"]
    unet["norm_num_groups"] = vae["norm_num_groups"] = 4
    unet["attention_head_dim"] = 2
    vae["block_out_channels"] = [w // 16 for w in vae["block_out_channels"]]
    unet["sample_size"], vae["sample_size"] = 8, 64
    if "adm_in_channels" in small:
        unet["addition_time_embed_dim"] = 4
        unet["projection_class_embeddings_input_dim"] = small["adm_in_channels"]
        depth = small["transformer_depth"]
        unet["transformer_layers_per_block"] = depth if isinstance(depth, int) else list(depth)
    for part in ("text_encoder", "text_encoder_2"):
        if part in tables:
            width = 12 if tables[part]["hidden_act"] == "quick_gelu" else 16
            tables[part] |= dict(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                projection_dim=width,
                vocab_size=50,
            )
    if short:
        shorten(unet, vae, SHORT[name.removesuffix("-inpaint")])
    return tables


def shorten(unet: dict, vae: dict, arguments: dict) -> None:
    """Give a tiny model's configs the levels of a short one."""
    mult, attends = arguments["channel_mult"], arguments["attention_resolutions"]
    crosses = [2**level in attends for level in range(len(mult))]
    unet["block_out_channels"] = [8 * m for m in mult]
    unet["down_block_types"] = ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crosses]
    unet["up_block_types"] = ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in crosses[::-1]]
    if "transformer_depth" in arguments:
        unet["transformer_layers_per_block"] = list(arguments["transformer_depth"])
    if "disable_self_attentions" in arguments:
        unet["only_cross_attention"] = [bool(d) for d in arguments["disable_self_attentions"]]
    vae["block_out_channels"] = [8, 16]
    vae["down_block_types"] = ["DownEncoderBlock2D"] * 2
    vae["up_block_types"] = ["UpDecoderBlock2D"] * 2
    unet["layers_per_block"] = vae["layers_per_block"] = 1
