"""The shipped configs: their networks are torch's, their files are found and say what they are."""

import pytest

from sdjax import config
from sdjax.errors import InputError

NAMES = (
    "scenes",
    "sd1",
    "sd1-inpaint",
    "sd2",
    "sd2-base",
    "sd2-inpaint",
    "sdxl",
    "sdxl-inpaint",
    "sdxl-refiner",
    "x4-upscaler",
)


def torch_shapes(part: str, table: dict) -> dict[str, tuple[int, ...]]:
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if part == "unet":
            net = diffusers.UNet2DConditionModel.from_config(table)
        elif part == "vae":
            net = diffusers.AutoencoderKL.from_config(table)
        else:
            kind = getattr(transformers, table["architectures"][0])
            net = kind(transformers.CLIPTextConfig(**table))
    return {key: tuple(value.shape) for key, value in net.named_parameters()}


def our_shapes(part: str, table: dict) -> dict[str, tuple[int, ...]]:
    from sdjax.models.clip import CLIPTextModel, CLIPTextModelWithProjection
    from sdjax.models.unet import UNet
    from sdjax.models.vae import AutoencoderKL

    text = (
        CLIPTextModelWithProjection
        if "CLIPTextModelWithProjection" in table.get("architectures", ())
        else CLIPTextModel
    )
    kinds = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": text, "text_encoder_2": text}
    return kinds[part].from_config(table).shapes()


def test_ten_configs_are_shipped() -> None:
    assert config.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_network_of_a_shipped_config_has_torchs_names_and_shapes(name: str) -> None:
    tables = config.read(name)
    parts = [p for p in ("unet", "vae", "text_encoder", "text_encoder_2") if p in tables]
    assert len(parts) == (4 if name in ("sdxl", "sdxl-inpaint") else 3)
    for part in parts:
        assert our_shapes(part, tables[part]) == torch_shapes(part, tables[part]), part


def test_parameter_counts_are_the_published_ones() -> None:
    def millions(name: str, part: str) -> float:
        import math

        shapes = torch_shapes(part, config.read(name)[part])
        return round(sum(map(math.prod, shapes.values())) / 1e6, 2)

    # Published: 860M and 83.65M for SD1, 865.91M for SD2, 2.57B for SDXL, 2.3B for its refiner.
    assert millions("sd1", "unet") == 859.52
    assert millions("sd1", "vae") == 83.65
    assert millions("sd1", "text_encoder") == 123.06
    assert millions("sd2", "unet") == 865.91
    assert millions("sdxl", "unet") == 2567.46
    assert millions("sdxl", "text_encoder_2") == 694.66
    assert millions("x4-upscaler", "unet") == 473.40


@pytest.mark.parametrize("name", NAMES)
def test_the_scheduler_of_a_shipped_config_is_one_that_diffusers_builds(name: str) -> None:
    import diffusers

    table = config.read(name)["scheduler"]
    built = getattr(diffusers, table["_class_name"]).from_config(table)
    assert built.config.prediction_type == table["prediction_type"]
    assert hasattr(diffusers, config.read(name)["model_index"]["_class_name"])


def test_reading_gives_fresh_dicts() -> None:
    config.read("sd1")["unet"]["in_channels"] = 9
    assert config.read("sd1")["unet"]["in_channels"] == 4


def test_a_toml_file_of_the_same_form_is_read_by_its_path(tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('description = "Mine."\n[unet]\nin_channels = 3\n')
    assert config.read(file) == {"unet": {"in_channels": 3}}
    assert config.read(str(file)) == {"unet": {"in_channels": 3}}


def test_bad_configs_are_refused_in_one_sentence(tmp_path) -> None:
    with pytest.raises(InputError, match="'sd7' is neither a shipped config .*sd2-base"):
        config.read("sd7")
    file = tmp_path / "mine.toml"
    file.write_text("[unet\n")
    with pytest.raises(InputError, match="not valid TOML"):
        config.read(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not valid TOML"):
        config.read(file)
    file.write_text("a = 1\n")
    with pytest.raises(InputError, match="no tables"):
        config.read(file)
