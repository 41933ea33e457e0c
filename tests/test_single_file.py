"""Single files: every name of the published layouts, against diffusers' own conversion."""

import functools
import json
import math
import shutil
import types
from pathlib import Path

import jax
import ldm
import numpy as np
import peers
import pytest
import tiny

from sdjax import config as shipped
from sdjax.checkpoints import (
    compvis,
    finding,
    loading,
    openclip,
    safetensors,
    single_file,
    single_file_saving,
)
from sdjax.checkpoints.detect import marked_prediction
from sdjax.checkpoints.placing import to_params
from sdjax.checkpoints.tensors import Tensor, Tensors
from sdjax.errors import InputError

NAMES = tuple(n for n in shipped.names() if n != "scenes")  # those with published files
ASSETS = Path(single_file.__file__).parents[1] / "assets" / "clip_tokenizer"
WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")


def unread(shapes: ldm.Shapes, metadata: dict | None = None) -> Tensors:
    """A file of these shapes whose weights cannot be read."""

    def read() -> np.ndarray:
        raise AssertionError("the weights were read")

    path = Path("file.safetensors")
    floats = np.dtype(np.float32)
    return Tensors({k: Tensor(k, s, floats, path, read) for k, s in shapes.items()}, path, metadata)


@functools.cache
def weights(name: str, short: bool = False) -> dict[str, np.ndarray]:
    """The tiny or short checkpoint of a family, in the published layout."""
    rng = np.random.default_rng(0)
    shapes = ldm.checkpoint(name, tiny=True, short=short)
    return {k: np.asarray(rng.standard_normal(s, np.float32)) for k, s in shapes.items()}


def save(path: Path, arrays: dict[str, np.ndarray], metadata: dict | None = None) -> Tensors:
    """A file written by the reference implementation of the format, opened by ours."""
    from safetensors.numpy import save_file

    save_file(arrays, path, metadata=metadata)
    return safetensors.open(path)


def write_folder(folder: Path, tables: dict) -> Path:
    """The configs and tokenizers of a diffusers folder, without weights."""
    index = {"safety_checker": [None, None], "feature_extractor": [None, None]}
    for part, table in tables.items():
        if part == "model_index":
            index |= table
        else:
            kind = table.get("_class_name") or table.get("tokenizer_class")
            library = "diffusers" if "_class_name" in table else "transformers"
            index[part] = [library, kind or table["architectures"][0]]
        if "tokenizer" in part:
            (folder / part).mkdir(parents=True, exist_ok=True)
            for name in ("vocab.json", "merges.txt"):
                shutil.copy(ASSETS / name, folder / part)
    tables = tables | {"model_index": index}
    for part, table in tables.items():
        kind = {"model_index": "", "scheduler": "scheduler_config.json"}
        name = kind.get(part, "tokenizer_config.json" if "tokenizer" in part else "config.json")
        file = folder / part / name if name else folder / "model_index.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(table))
    return folder


@pytest.fixture
def folder(tmp_path: Path):
    """Write the configs of a tiny or short family as a diffusers folder."""

    def write(name: str, short: bool = False) -> Path:
        return write_folder(tmp_path / f"{name}-configs", ldm.tiny_configs(name, short))

    return write


@pytest.fixture
def names_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check for missing keys, which traces a network: it has a test of its own."""
    monkeypatch.setattr(single_file, "whole", lambda *arguments: None)


def network(part: str, table: dict, device: str = "meta"):
    """The torch network of a config."""
    import diffusers
    import torch
    import transformers

    with torch.device(device):
        if part == "unet":
            return diffusers.UNet2DConditionModel.from_config(table)
        if part == "vae":
            return diffusers.AutoencoderKL.from_config(table)
        kind = getattr(transformers, table["architectures"][0])
        return kind(transformers.CLIPTextConfig(**table))


def test_the_reconstructed_layouts_have_the_published_numbers_of_weights() -> None:
    sd1, xl = ldm.checkpoint("sd1"), ldm.checkpoint("sdxl")
    assert round(sum(map(math.prod, sd1.values())) / 1e6, 2) == 1066.24
    assert round(sum(map(math.prod, xl.values())) / 1e6, 1) == 3468.8
    assert sum(key.startswith(ldm.UNET) for key in sd1) == 686
    assert sum(key.startswith(ldm.UNET) for key in xl) == 1680
    assert sum(key.startswith(ldm.VAE) for key in xl) == 248


@pytest.mark.parametrize("name", NAMES)
def test_every_published_layout_is_torchs_in_names_and_shapes_unread(name, names_only) -> None:
    given = name if name in ("sd2", "sd2-base") else None
    parts = single_file.read(unread(ldm.checkpoint(name)), given)
    assert {part: table for part, (table, _) in parts.items()} == shipped.read(name)
    for part in set(WEIGHTS) & set(parts):
        table, found = parts[part]
        net = network(part, table)
        wanted = {key: tuple(value.shape) for key, value in net.named_parameters()}
        assert {key: tensor.shape for key, tensor in found.items()} == wanted, part


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner", "x4-upscaler"])
def test_the_values_are_those_of_diffusers_own_conversion(
    name, tmp_path, folder, names_only
) -> None:
    import torch
    from diffusers.loaders import single_file_utils as peer

    tensors = save(tmp_path / "file.safetensors", weights(name))
    theirs = {key: torch.from_numpy(value) for key, value in weights(name).items()}
    parts = single_file.read(tensors, folder(name))
    for part in set(WEIGHTS) & set(parts):
        table, found = parts[part]
        if part == "unet":
            wanted = peer.convert_ldm_unet_checkpoint(dict(theirs), table)
        elif part == "vae":
            wanted = peer.convert_ldm_vae_checkpoint(dict(theirs), table)
        elif table["hidden_act"] == "quick_gelu":
            wanted = peer.convert_ldm_clip_checkpoint(dict(theirs))
            wanted = {key.removeprefix("text_model."): value for key, value in wanted.items()}
        else:
            prefix = single_file_saving.places(shipped.read(name))[part].prefix
            net = network(part, table)
            wanted = peer.convert_open_clip_checkpoint(net, dict(theirs), prefix)
            if part == "text_encoder":
                # The peer drops layer 23 by its number; here the layer dropped is the third.
                wanted = {
                    key.removeprefix("text_model."): value
                    for key, value in wanted.items()
                    if "layers.2." not in key and key != "text_projection.weight"
                }
        assert set(found) == set(wanted), part
        for key, value in wanted.items():
            np.testing.assert_array_equal(found[key].read(), value.numpy(), err_msg=key)


def test_names_go_back_and_forth_without_loss(names_only) -> None:
    for name in NAMES:
        tables = shipped.read(name)
        for table in (compvis.unet(tables["unet"]), compvis.vae(tables["vae"])):
            assert len(compvis.inverse(table)) == len(table)
        given = name if name in ("sd2", "sd2-base") else None
        parts = single_file.read(unread(ldm.checkpoint(name)), given)
        for part, place in single_file_saving.places(tables).items():
            spell = single_file.write_names(part, tables[part], place)
            table, found = parts[part]
            assert all(spell(key) == tensor.name for key, tensor in found.items())


def test_a_key_without_a_table_entry_has_no_other_name() -> None:
    table = compvis.unet(shipped.read("sd1")["unet"])
    assert compvis.rename("down_blocks.0.resnets.0.norm1.bias", table) == (
        "input_blocks.1.0.in_layers.0.bias"
    )
    assert compvis.rename("down_blocks.3.attentions.0.norm.bias", table) is None
    assert compvis.rename("conv_inn.weight", table) is None
    assert openclip.to_openclip("nothing.weight", {}) is None


def test_old_text_encoders_without_text_model_are_read_too(tmp_path, folder, names_only) -> None:
    arrays = {
        key.replace("text_model.", ""): value for key, value in weights("sd1", short=True).items()
    }
    parts = single_file.read(save(tmp_path / "a.safetensors", arrays), folder("sd1", short=True))
    assert set(parts["text_encoder"][1]) == {
        key.removeprefix("cond_stage_model.transformer.")
        for key in arrays
        if key.startswith("cond_stage_model.")
    }


def test_ema_weights_replace_the_unets_and_no_others(tmp_path, folder, names_only) -> None:
    arrays = dict(weights("sd1", short=True))
    for key, value in weights("sd1", short=True).items():
        if key.startswith(ldm.UNET):
            name = "model_ema.diffusion_model" + key.removeprefix(ldm.UNET).replace(".", "")
            arrays[name] = value + 1
    arrays |= {"model_ema.decay": np.float32([0.9999]), "model_ema.num_updates": np.int32([3])}
    tensors, configs = save(tmp_path / "a.safetensors", arrays), folder("sd1", short=True)
    plain = single_file.read(tensors, configs)
    averaged = single_file.read(tensors, configs, ema=True)
    for key, tensor in plain["unet"][1].items():
        np.testing.assert_array_equal(averaged["unet"][1][key].read(), tensor.read() + 1)
    for part in ("vae", "text_encoder"):
        for key, tensor in plain[part][1].items():
            np.testing.assert_array_equal(averaged[part][1][key].read(), tensor.read())


def test_ema_weights_that_are_not_there_are_refused() -> None:
    shapes = ldm.checkpoint("sd1")
    with pytest.raises(InputError, match="has no EMA weights.*without ema"):
        single_file.read(unread(shapes), ema=True)
    shapes["model_ema.diffusion_modelout2bias"] = (4,)
    with pytest.raises(InputError, match="has some EMA weights, and none for"):
        single_file.read(unread(shapes), ema=True)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_autoencoder_alone_is_read_with_or_without_its_prefix(prefix: str) -> None:
    shapes = ldm.under(prefix, ldm.autoencoder_kl())
    shapes |= {f"{prefix}loss.logvar": (), f"{prefix}loss.discriminator.main.0.weight": (64, 3)}
    parts = single_file.read(unread(shapes))
    assert list(parts) == ["vae"]
    assert parts["vae"][0]["scaling_factor"] == 0.18215
    assert {key: tensor.shape for key, tensor in parts["vae"][1].items()} == {
        key: tuple(value.shape) for key, value in network("vae", parts["vae"][0]).named_parameters()
    }
    assert single_file.read(unread(shapes), "sdxl")["vae"][0]["scaling_factor"] == 0.13025


def test_only_documented_extra_keys_are_tolerated(names_only) -> None:
    known = {
        "betas": (1000,),
        "alphas_cumprod_prev": (1000,),
        "posterior_mean_coef2": (1000,),
        "logvar": (1000,),
        "model_ema.decay": (),
        "model_ema.num_updates": (),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
        "cond_stage_model.logit_scale": (),
        "first_stage_model.loss.logvar": (),
    }
    shapes = ldm.checkpoint("sd1")
    with_known = single_file.read(unread(shapes | known))
    assert set(with_known["unet"][1]) == set(single_file.read(unread(shapes))["unet"][1])
    for stray in (
        "surprise",
        "model.diffusion_model.input_blocks.12.0.in_layers.0.weight",
        "model.diffusion_model.input_blocks.10.1.norm.weight",
        "first_stage_model.encoder.mid.attn_2.q.weight",
        "cond_stage_model.transformer.vision_model.x",
        "model_emas.decay",
    ):
        with pytest.raises(InputError, match="file.safetensors has the key.*does not know") as info:
            single_file.read(unread(shapes | {stray: (3,)}))
        assert stray in str(info.value)


def test_layers_beyond_the_dropped_one_are_not_tolerated(names_only) -> None:
    shapes = ldm.checkpoint("sd2")
    assert "cond_stage_model.model.transformer.resblocks.23.ln_1.weight" in shapes
    single_file.read(unread(shapes), "sd2")
    extra = {"cond_stage_model.model.transformer.resblocks.24.ln_1.weight": (1024,)}
    with pytest.raises(InputError, match="resblocks.24"):
        single_file.read(unread(shapes | extra), "sd2")
    xl = ldm.checkpoint("sdxl")
    extra = {"conditioner.embedders.1.model.transformer.resblocks.32.ln_1.weight": (1280,)}
    with pytest.raises(InputError, match="resblocks.32"):
        single_file.read(unread(xl | extra))


def test_a_layer_that_is_no_number_is_a_key_too_many(names_only) -> None:
    for layer in ("x", "\u0661", "9" * 5000, "-1"):
        key = f"cond_stage_model.model.transformer.resblocks.{layer}.attn.in_proj_weight"
        with pytest.raises(InputError, match="file.safetensors has the key 'cond_stage_model.mod"):
            single_file.read(unread(ldm.checkpoint("sd2") | {key: (3,)}), "sd2")


def test_what_a_config_leaves_out_has_its_networks_default(folder, names_only) -> None:
    configs = folder("sd1")
    wanted = single_file.read(unread(ldm.checkpoint("sd1", tiny=True)), configs)
    for part, keys in (("unet", ["layers_per_block", "in_channels"]), ("vae", ["latent_channels"])):
        file = configs / part / "config.json"
        table = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in table.items() if k not in keys}))
    found = single_file.read(unread(ldm.checkpoint("sd1", tiny=True)), configs)
    for part in WEIGHTS[:3]:
        assert set(found[part][1]) == set(wanted[part][1])


def test_a_pad_token_is_a_text_or_has_one() -> None:
    assert finding.padding({"pad_token": {"content": "!", "lstrip": False}}, "x") == "!"
    assert finding.padding({}, "x") == "<|endoftext|>"
    with pytest.raises(InputError, match="config 'x.toml': 'pad_token' must be text"):
        finding.padding({"pad_token": ["!"]}, "x.toml")


def test_one_weight_under_two_keys_is_refused() -> None:
    shapes = ldm.checkpoint("sd1")
    twice = {"cond_stage_model.transformer.final_layer_norm.bias": (768,)}
    with pytest.raises(InputError, match="one weight under two keys"):
        single_file.read(unread(shapes | twice))


def test_a_missing_key_is_named_as_the_file_spells_it(folder) -> None:
    configs = {name: folder(name, short=True) for name in ("sd1", "sdxl")}
    for name, key in (
        ("sd1", "model.diffusion_model.output_blocks.2.1.transformer_blocks.0.attn2.to_v.weight"),
        ("sd1", "first_stage_model.decoder.up.1.block.0.conv1.bias"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"),
        ("sdxl", "conditioner.embedders.1.model.text_projection"),
        ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"),
    ):
        shapes = ldm.checkpoint(name, short=True)
        del shapes[key]
        with pytest.raises(InputError, match="file.safetensors lacks") as info:
            single_file.read(unread(shapes), configs[name])
        assert repr(key) in str(info.value)


def load(tensors: Tensors, configs: Path) -> tuple[types.SimpleNamespace, dict]:
    """A model and its params, without the bundle."""
    parts = single_file.read(tensors, configs)
    tables = {part: table for part, (table, _) in parts.items()}
    nets = {
        part: loading.CLASSES[part].from_config(tables[part]) for part in WEIGHTS if part in tables
    }
    params = {part: to_params(net, parts[part][1]) for part, net in nets.items()}
    return types.SimpleNamespace(**nets, scheduler=tables["scheduler"]), params


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner", "x4-upscaler"])
def test_saving_gives_back_every_byte_under_the_published_names(name, tmp_path, folder) -> None:
    configs = folder(name, short=True)
    model, params = load(save(tmp_path / "a.safetensors", weights(name, short=True)), configs)
    single_file_saving.write(tmp_path / "b.safetensors", model, params)
    saved = safetensors.open(tmp_path / "b.safetensors")
    kept = {
        key: value
        for key, value in weights(name, short=True).items()
        if not key.endswith("logit_scale")
        and not key.startswith("cond_stage_model.model.transformer.resblocks.2.")
        and key != "cond_stage_model.model.text_projection"
    }
    markers = {"v_pred"} & set(saved)
    assert set(saved) - markers == set(kept)
    for key, value in kept.items():
        np.testing.assert_array_equal(saved[key].read(), value, err_msg=key)
    model, params = load(saved, configs)
    single_file_saving.write(tmp_path / "c.safetensors", model, params)
    assert (tmp_path / "c.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_prediction_survives_saving(tmp_path, folder) -> None:
    for name, wanted in (("sd2", "v_prediction"), ("sd2-base", "epsilon")):
        model, params = load(
            save(tmp_path / "a.safetensors", weights(name, short=True)), folder(name, short=True)
        )
        single_file_saving.write(tmp_path / "b.safetensors", model, params)
        assert marked_prediction(safetensors.open(tmp_path / "b.safetensors")) == wanted


def test_saving_casts_to_the_dtype_asked_for(tmp_path, folder) -> None:
    model, params = load(
        save(tmp_path / "a.safetensors", weights("sdxl", short=True)), folder("sdxl", short=True)
    )
    half = np.dtype(np.float16)
    single_file_saving.write(tmp_path / "b.safetensors", model, params, half)
    for key, tensor in safetensors.open(tmp_path / "b.safetensors").items():
        assert tensor.dtype == half
        np.testing.assert_array_equal(tensor.read(), weights("sdxl", short=True)[key].astype(half))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_torch_diffusers_loads_what_we_saved_with_equal_weights(name, tmp_path, folder) -> None:
    import diffusers

    configs, file = folder(name, short=True), tmp_path / "b.safetensors"
    model, params = load(save(tmp_path / "a.safetensors", weights(name, short=True)), configs)
    single_file_saving.write(file, model, params)
    kind = getattr(diffusers, shipped.read(name)["model_index"]["_class_name"])
    pipe = kind.from_single_file(str(file), config=str(configs), local_files_only=True)
    nets = {part: getattr(pipe, part) for part in WEIGHTS if part in params}
    assert len(nets) == (4 if name == "sdxl" else 3)
    for part, net in nets.items():
        ours = jax.tree.map(np.asarray, params[part])
        assert tiny.equal(ours, peers.flax_params(net)), part


def test_a_pickled_checkpoint_gives_the_same_tensors(tmp_path, folder, names_only) -> None:
    import torch

    from sdjax.checkpoints import pickles

    arrays = weights("sd2", short=True)
    state = {key: torch.from_numpy(value) for key, value in arrays.items()}
    state["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    nested = {"epoch": 3, "global_step": 110000, "state_dict": state}
    torch.save(nested, tmp_path / "file.ckpt")
    tensors = pickles.open(tmp_path / "file.ckpt")
    assert marked_prediction(tensors) == "v_prediction"
    pickled = single_file.read(tensors, folder("sd2", short=True))
    plain = single_file.read(save(tmp_path / "a.safetensors", arrays), folder("sd2", short=True))
    for part in ("unet", "vae", "text_encoder"):
        assert set(pickled[part][1]) == set(plain[part][1])
        for key, tensor in plain[part][1].items():
            np.testing.assert_array_equal(pickled[part][1][key].read(), tensor.read())
