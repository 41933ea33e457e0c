"""Which model a single file is: told from its keys, shapes and markers, or refused."""

import json
from pathlib import Path

import ldm
import numpy as np
import pytest

from sdjax import config as shipped
from sdjax.checkpoints.detect import Place, family, identify, layout, marked_prediction
from sdjax.checkpoints.tensors import Tensor, Tensors
from sdjax.errors import InputError

FLOATS = np.dtype(np.float32)


def unread(shapes: ldm.Shapes, metadata: dict | None = None) -> Tensors:
    """A file of these shapes whose weights cannot be read."""

    def read() -> np.ndarray:
        raise AssertionError("the weights were read")

    path = Path("file.safetensors")
    return Tensors({k: Tensor(k, s, FLOATS, path, read) for k, s in shapes.items()}, path, metadata)


def without(shapes: ldm.Shapes, *prefixes: str) -> ldm.Shapes:
    return {key: shape for key, shape in shapes.items() if not key.startswith(prefixes)}


@pytest.mark.parametrize(
    "name", [n for n in shipped.names() if n not in ("scenes", "sd2", "sd2-base")]
)
def test_every_family_is_told_by_its_keys_and_shapes(name: str) -> None:
    found = identify(unread(ldm.checkpoint(name)))
    assert found.name == name
    assert found.configs == shipped.read(name)
    assert set(found.places) == set(found.configs) & {
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
    }
    assert found.note is None


def test_layouts_say_under_which_names_the_text_encoders_stand() -> None:
    assert layout(unread(ldm.checkpoint("sdxl")))["text_encoder"] == Place(
        "conditioner.embedders.0.transformer.", "transformers"
    )
    assert layout(unread(ldm.checkpoint("sdxl-refiner")))["text_encoder_2"] == Place(
        "conditioner.embedders.0.model.", "openclip"
    )
    assert layout(unread(ldm.checkpoint("sd2")))["text_encoder"].style == "openclip"


def test_sd2_without_a_marker_is_refused_naming_both_choices() -> None:
    with pytest.raises(InputError, match="--config .*sd2 for .*velocity.* or sd2-base for"):
        identify(unread(ldm.checkpoint("sd2")))
    for name in ("sd2", "sd2-base"):
        assert identify(unread(ldm.checkpoint("sd2")), name).name == name


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-v2-512"}, "sd2-base"),
        ({"modelspec.prediction_type": "v"}, "sd2"),
        ({"modelspec.prediction_type": "v-prediction"}, "sd2"),
        ({"modelspec.prediction_type": "epsilon"}, "sd2-base"),
        ({"global_step": "875000"}, "sd2-base"),
        ({"global_step": "110000"}, "sd2"),
    ],
)
def test_sd2s_prediction_is_told_by_metadata(metadata: dict, name: str) -> None:
    found = identify(unread(ldm.checkpoint("sd2"), metadata))
    assert found.name == name
    assert found.configs["scheduler"]["prediction_type"] == marked_prediction(
        unread(ldm.checkpoint("sd2"), metadata)
    )


@pytest.mark.parametrize("step", ["7", "nan", "inf", "seven", "1e999", ""])
def test_an_unknown_global_step_says_nothing(step: str) -> None:
    assert marked_prediction(unread({}, {"global_step": step})) is None


def test_a_global_step_saved_as_a_tensor_is_read() -> None:
    path = Path("f")
    step = Tensor("global_step", (), np.dtype(np.int64), path, lambda: np.asarray(875000))
    assert marked_prediction(Tensors({"global_step": step}, path)) == "epsilon"


def test_marker_tensors_set_velocity_and_zero_terminal_snr() -> None:
    plain = identify(unread(ldm.checkpoint("sdxl"))).configs["scheduler"]
    assert plain["prediction_type"] == "epsilon" and "rescale_betas_zero_snr" not in plain
    marked = ldm.checkpoint("sdxl") | {"v_pred": (0,)}
    scheduler = identify(unread(marked)).configs["scheduler"]
    assert scheduler == plain | {"prediction_type": "v_prediction"}
    scheduler = identify(unread(marked | {"ztsnr": (0,)})).configs["scheduler"]
    assert scheduler["rescale_betas_zero_snr"] is True
    assert scheduler["timestep_spacing"] == "trailing"
    assert identify(unread(ldm.checkpoint("sd2") | {"v_pred": (0,)})).name == "sd2"


def test_a_config_that_a_marker_contradicts_is_refused() -> None:
    marked = unread(ldm.checkpoint("sdxl") | {"v_pred": (0,)})
    with pytest.raises(InputError, match="marked 'v_pred', and config 'sdxl' does not have"):
        identify(marked, "sdxl")


def test_a_toml_file_or_a_folder_serves_as_config(tmp_path) -> None:
    shapes = ldm.checkpoint("sd1", tiny=True)
    tables = ldm.tiny_configs("sd1")
    for part, name in (("unet", "config"), ("vae", "config"), ("text_encoder", "config")):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{name}.json").write_text(json.dumps(tables[part]))
    with pytest.raises(InputError, match=r"no noise schedule.*\[scheduler\]"):
        identify(unread(shapes), tmp_path)
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(tables["scheduler"]))
    found = identify(unread(shapes), tmp_path)
    assert found.configs["unet"] == tables["unet"]
    assert found.configs["tokenizer"] == {"pad_token": "<|endoftext|>"}

    file = write_toml(tmp_path / "tiny.toml", tables)
    assert identify(unread(shapes), str(file)).configs == tables


def write_toml(file: Path, tables: dict) -> Path:
    """Tables whose values JSON and TOML spell alike."""
    lines = []
    for part, table in tables.items():
        lines += [f"[{part}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    file.write_text("\n".join(lines))
    return file


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "block_out_channels", 8),
        ("unet", "in_channels", "4"),
        ("unet", "layers_per_block", 10**12),
        ("unet", "down_block_types", [1, 2]),
        ("vae", "block_out_channels", []),
        ("vae", "latent_channels", [4]),
        ("vae", "layers_per_block", 10**12),
        ("text_encoder", "num_hidden_layers", 10**12),
        ("text_encoder", "hidden_size", "12"),
    ],
)
def test_a_config_of_no_network_is_refused_naming_file_and_key(part, key, value, tmp_path) -> None:
    tables = ldm.tiny_configs("sd1")
    tables[part][key] = value
    file = write_toml(tmp_path / "x.toml", tables)
    with pytest.raises(InputError, match=f"^config '{file}': .* config: '{key}' must be"):
        identify(unread(ldm.checkpoint("sd1", tiny=True)), str(file))


@pytest.mark.parametrize(
    ("part", "key"),
    [("unet", "block_out_channels"), ("text_encoder", "vocab_size"), ("vae", "block_out_channels")],
)
def test_a_width_that_a_config_leaves_out_is_its_networks_default(part, key, tmp_path) -> None:
    tables = ldm.tiny_configs("sd1")
    del tables[part][key]
    if part == "vae":
        tables[part] |= {"down_block_types": ["DownEncoderBlock2D"]}
        tables[part] |= {"up_block_types": ["UpDecoderBlock2D"]}
    file = write_toml(tmp_path / "x.toml", tables)
    with pytest.raises(InputError, match="^file.safetensors: .* has shape"):
        identify(unread(ldm.checkpoint("sd1", tiny=True)), str(file))


def test_shapes_that_are_not_the_familys_are_refused_with_the_mend() -> None:
    with pytest.raises(InputError, match="'sd1' has 320 on axis 0.*--config.*folder"):
        identify(unread(ldm.checkpoint("sd1", tiny=True)))
    with pytest.raises(InputError, match="where 'sd2' has"):
        identify(unread(ldm.checkpoint("sd1")), "sd2")
    shapes = ldm.checkpoint("sd1")
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (320,)
    with pytest.raises(InputError, match="no convolution"):
        identify(unread(shapes))
    with pytest.raises(InputError, match="has shape"):
        identify(unread(shapes), "sd1")


@pytest.mark.parametrize(
    ("prefixes", "missing"),
    [
        (("cond_stage_model.",), "and no text encoder, which 'sd1' needs"),
        (("first_stage_model.",), "and no VAE, which"),
        (("cond_stage_model.", "first_stage_model."), "a UNet, and no VAE and text encoder"),
        (("model.diffusion_model.",), "holds VAE and text encoder, and no UNet"),
    ],
)
def test_a_missing_part_is_named(prefixes: tuple[str, ...], missing: str) -> None:
    missing = missing.replace("a UNet", "UNet")
    with pytest.raises(InputError, match=missing):
        identify(unread(without(ldm.checkpoint("sd1"), *prefixes)))


def test_a_unet_alone_is_placed_by_its_context_width() -> None:
    for name in ("sd1", "sdxl", "sdxl-refiner", "sd1-inpaint", "x4-upscaler"):
        tensors = unread(
            without(ldm.checkpoint(name), "cond_stage_model.", "conditioner.", "first_stage_model.")
        )
        assert family(tensors, layout(tensors)) == name


def test_an_autoencoder_alone_is_taken_for_sd1s_and_says_so() -> None:
    shapes = ldm.autoencoder_kl()
    found = identify(unread(shapes))
    assert found.name == "sd1" and list(found.places) == ["vae"]
    assert found.note and "--config sdxl" in found.note
    assert identify(unread(shapes), "sdxl").note is None
    marked = identify(unread(shapes, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}))
    assert marked.configs["vae"]["scaling_factor"] == 0.13025


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
        ("model.diffusion_model.double_blocks.0.img_attn.proj.weight", "Flux or SD3"),
        ("model.diffusion_model.joint_blocks.0.x.weight", "Flux or SD3"),
        ("down_blocks.0.resnets.0.conv1.weight", "one network in diffusers' names"),
        ("encoder.mid_block.resnets.0.conv1.weight", "one network in diffusers' names"),
        ("text_model.final.weight", "not a checkpoint of Stable Diffusion"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder alone"),
        ("input_blocks.0.0.weight", "a UNet alone"),
        ("edm_vpred.sigma_max", "EDM's noise conditioning"),
        ("hello", "not a checkpoint of Stable Diffusion: .*'hello'"),
    ],
)
def test_weights_of_another_kind_are_named(key: str, kind: str) -> None:
    with pytest.raises(InputError, match=f"^file.safetensors is .*{kind}"):
        identify(unread({key: (1,)}))
    with pytest.raises(InputError, match="no tensors at all"):
        identify(unread({}))


@pytest.mark.parametrize(("channels", "kind"), [(5, "depth-to-image"), (8, "InstructPix2Pix")])
def test_input_channels_that_no_task_here_has_are_refused(channels: int, kind: str) -> None:
    shapes = ldm.checkpoint("sd2")
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (320, channels, 3, 3)
    with pytest.raises(InputError, match=f"takes {channels} channels, as {kind}"):
        identify(unread(shapes))


def test_two_text_encoders_in_one_place_are_refused() -> None:
    both = ldm.checkpoint("sd1") | ldm.under("cond_stage_model.model.", ldm.open_clip(1024, 24))
    with pytest.raises(InputError, match="two of the text encoder"):
        identify(unread(both))


def test_a_part_that_the_config_does_not_describe_is_refused() -> None:
    extra = ldm.under("conditioner.embedders.1.model.", ldm.open_clip(1280, 32))
    with pytest.raises(InputError, match="describes no OpenCLIP text encoder"):
        identify(unread(ldm.checkpoint("sd1") | extra), "sd1")
