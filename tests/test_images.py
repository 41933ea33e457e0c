"""PNGs carry their settings and come back; names are safe; sheets have good proportions."""

import json
import struct
import zlib

import numpy as np
import pytest

from sdjax import images
from sdjax.errors import InputError

SETTINGS = {
    "prompt": 'a cat, "quoted" \u732b \N{CAT}\nsecond line: x',
    "negative_prompt": "blurry",
    "seed": 2**64 - 1,
    "steps": 20,
    "sampler": "dpmpp_2m",
    "spacing": "karras",
    "guidance_scale": 7.5,
    "width": 512,
    "height": 640,
    "model_name": "my, model",
    "model_hash": "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
    "version": "0.1.0",
}


def picture(height=16, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_a_saved_image_gives_back_its_pixels_and_settings(tmp_path):
    path = images.save(tmp_path / "new", "a", picture(), SETTINGS)
    assert path == tmp_path / "new" / "a.png"
    np.testing.assert_array_equal(images.read(path), picture())
    assert images.read_settings(path) == SETTINGS
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_the_parameters_line_is_what_other_programs_read(tmp_path):
    from PIL import Image

    path = images.save(tmp_path, "a", picture(), SETTINGS)
    with Image.open(path) as image:
        line = image.text["parameters"]
    assert line == (
        'a cat, "quoted" \u732b \N{CAT}\nsecond line: x\nNegative prompt: blurry\nSteps: 20, '
        "Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 18446744073709551615, "
        'Size: 512x640, Model hash: 6ce0161689, Model: "my, model", Version: sdjax 0.1.0'
    )


def test_the_parameters_line_knows_the_other_programs_names():
    line = images.parameters(SETTINGS | {"spacing": "sgm_uniform", "noise": "torch-cuda"})
    assert "Schedule type: SGM Uniform, " in line and ", RNG: NV, " in line


def test_the_parameters_line_has_loras_where_the_other_program_has_them():
    loras = [{"name": "a, b:c", "scale": 0.5, "short_hash": "0123456789ab"}]
    loras.append({"name": "ink", "scale": -1.0, "short_hash": "ba9876543210"})
    lines = images.parameters(SETTINGS | {"prompt": "a cat", "loras": loras}).split("\n")
    assert lines[0] == "a cat <lora:a bc:0.5> <lora:ink:-1>"
    hashes = '"a bc: 0123456789ab, ink: ba9876543210"'
    assert lines[-1].endswith(f", Lora hashes: {hashes}, Version: sdjax 0.1.0")


@pytest.mark.parametrize("prompt", ["a\0b", "lone \ud83d", "", "\N{CAT}" * 5000])
def test_any_prompt_survives_the_file(tmp_path, prompt):
    path = images.save(tmp_path, "a", picture(), SETTINGS | {"prompt": prompt})
    assert images.read_settings(path)["prompt"] == prompt


def test_nothing_is_overwritten(tmp_path):
    paths = [images.save(tmp_path, "a", picture(seed=i), {}) for i in range(3)]
    assert [p.name for p in paths] == ["a.png", "a-2.png", "a-3.png"]
    for seed, path in enumerate(paths):
        np.testing.assert_array_equal(images.read(path), picture(seed=seed))


def test_without_hard_links_nothing_is_overwritten_either(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(images.os, "link", refuse)
    assert [images.save(tmp_path, "a", picture()).name for _ in range(2)] == ["a.png", "a-2.png"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        images.save(tmp_path / "file", "a", picture())


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + body + chunk(b"IEND", b"")


def text(value):
    return chunk(b"tEXt", b"sdjax\0" + value)


BROKEN = {
    "empty": (b"", "not a PNG"),
    "a page": (b"<!DOCTYPE html>", "not a PNG"),
    "no settings": (png(), "holds no settings"),
    "not JSON": (png(text(b"{")), "damaged"),
    "deep JSON": (png(text(b"[" * 100_000)), "damaged"),
    "a list": (png(text(b"[]")), "damaged"),
    "truncated": (png(text(b"{}"))[:60], "."),
    "bad sum": (png(text(b"{}")).replace(b"sdjax\0", b"sdjay\0"), "."),
    "bomb": (png(chunk(b"zTXt", b"sdjax\0\0" + zlib.compress(b" " * 2**27))), "."),
    "huge": (
        png().replace(struct.pack(">II", 1, 1), struct.pack(">II", 2**30, 2**30)),
        ".",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_settings_of_a_broken_file_are_refused_in_a_sentence(tmp_path, case):
    data, message = BROKEN[case]
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as refused:
        images.read_settings(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_image_is_refused(tmp_path):
    for read in (images.read, images.read_settings):
        for path in (tmp_path / "nowhere.png", tmp_path):
            with pytest.raises(InputError):
                read(path)


def test_transparency_is_laid_over_white(tmp_path):
    from PIL import Image

    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert images.read(tmp_path / "a.png").tolist() == [[[255, 255, 255]] * 2]


@pytest.mark.parametrize(
    ("prompt", "stem"),
    [
        ("A cat, in a hat!", "A-cat-in-a-hat-7"),
        ("../../etc/passwd", "etc-passwd-7"),
        ("C:\\con", "C-con-7"),
        ("NUL", "NUL-7"),
        (".hidden", "hidden-7"),
        ("--help", "help-7"),
        ("", "image-7"),
        ("\0\n\x1b[0m\u202e", "0m-7"),
        ("\N{PARTY POPPER}", "image-7"),
        ("cafe\u0301", "caf\u00e9-7"),
        ("\u732b\u3068\u72ac", "\u732b\u3068\u72ac-7"),
        ("trailing. ", "trailing-7"),
        ("lone \ud83d surrogate", "lone-surrogate-7"),
    ],
)
def test_names_are_safe_whatever_the_prompt_holds(prompt, stem):
    assert images.safe_name(prompt, 7) == stem


def test_names_are_short_and_whole(tmp_path):
    for prompt in ("x" * 5000, "\u732b" * 500, "\U00020000" * 500, "e\u0301" * 500):
        stem = images.safe_name(prompt, 2**64 - 1)
        assert len(stem.encode()) <= 120 and stem.endswith("-18446744073709551615")
        images.save(tmp_path, stem, picture(8, 8))


def test_a_sheet_holds_every_image_in_reading_order():
    tones = [np.full((64, 64, 3), 40 * i, np.uint8) for i in range(6)]
    sheet = images.contact_sheet(tones)
    height, width, _ = sheet.shape
    assert 1 < width / height < 2  # three by two
    found = [
        int(sheet[int(height * (r + 0.5) / 2), int(width * (c + 0.5) / 3), 0])
        for r in range(2)
        for c in range(3)
    ]
    assert found == [0, 40, 80, 120, 160, 200]
    assert (sheet[0] == 255).all() and (sheet[:, -1] == 255).all()


def test_a_sheet_takes_any_caption_and_number():
    captions = ["", "a " * 500, "\u732b \N{CAT}\0\n", "x" * 5000, "\u00e9"]
    sheet = images.contact_sheet([picture(20, 20, i) for i in range(5)], captions, columns=2)
    assert sheet.shape[0] > sheet.shape[1]
    many = images.contact_sheet([picture(300, 200)] * 200, ["caption"] * 200)
    assert max(many.shape) < 4600
    one = images.contact_sheet([picture(8, 4000)])
    assert one.shape[1] < 4600
    with pytest.raises(InputError):
        images.contact_sheet([])


def test_settings_are_ascii_in_the_file(tmp_path):
    path = images.save(tmp_path, "a", picture(), SETTINGS)
    assert json.dumps(SETTINGS, sort_keys=True).encode("ascii") in path.read_bytes()
