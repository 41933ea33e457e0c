"""Pictures of every kind are read or skipped by name; folders and tars are what people have."""

import io
import json
import os
import struct
import tarfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdjax.errors import InputError
from sdjax.training import data
from sdjax.training.data.pixels import decode, fit
from sdjax.training.data.tars import expand


def picture(height=8, width=10, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    wave = [np.sin(x / 9 + y / 13 + c) for c in range(3)]
    return (127 + 120 * np.stack(wave, -1)).astype(np.uint8)


def encoded(pixels, format="PNG", **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, format, **options)
    return file.getvalue()


def folder(root, captions, **files):
    """An imagefolder: `captions` by file name, a picture each; `files` by name with __ for dots."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (name, caption) in enumerate(captions.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(seed=number)))
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        (root / name.replace("__", ".")).write_bytes(content)
    return root


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def shard(path, start, count, mode="w"):
    members = []
    for k in range(start, start + count):
        members.append((f"{k:04}.png", encoded(picture(seed=k))))
        members.append((f"{k:04}.txt", f"picture {k}\n".encode()))
    return tar(path, members, mode)


def skipped(source, index):
    assert source[index] is None
    return source.skipped[index]


# Pictures


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_a_picture_comes_as_it_is_stored(format):
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = np.repeat(picture()[..., :1], 3, -1)  # 80 greys fit a GIF's palette
    np.testing.assert_array_equal(decode(encoded(pixels, format, **options)), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(picture(), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(decode(file), np.asarray(upright))


def test_sixteen_bits_become_eight_and_are_not_clipped():
    values = np.linspace(0, 65535, 80).astype(np.uint16).reshape(8, 10)
    grey = decode(encoded(Image.fromarray(values)))
    assert np.abs(grey[..., 0] - values / 257.0).max() <= 0.5
    assert (grey == grey[..., :1]).all()


def test_transparency_is_laid_over_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = [10, 20, 30, 255]
    over = decode(encoded(pixels))
    assert over.tolist() == [[[10, 20, 30]] * 2, [[255] * 3] * 2]


def test_a_palette_with_a_transparent_colour_is_laid_over_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decode(encoded(image, transparency=1)).tolist() == [[[10, 20, 30], [255] * 3]]


def test_print_colours_become_screen_colours():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode(encoded(image, "JPEG", quality=100)).astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 3


def test_the_first_frame_of_what_moves_is_taken():
    frames = [Image.new("L", (4, 4), value) for value in (50, 200)]
    file = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(file) == 50).all()


def bomb():
    """A PNG that claims 60000 x 60000."""
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13)
    return start + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def spoiled_header():
    file = bytearray(encoded(picture()))
    file[20] ^= 0xFF
    return bytes(file)


BROKEN = {
    "empty": (b"", "empty"),
    "text": (b"not a picture at all", "not an image"),
    "page": (b"<html>404</html>" * 100, "not an image"),
    "cut_png": (encoded(picture(64, 64))[:2000], "truncated"),
    "cut_jpeg": (encoded(picture(64, 64), "JPEG")[:1500], "truncated"),
    "cut_webp": (encoded(picture(64, 64), "WEBP")[:200], None),
    "bomb": (bomb(), "larger than any image should be"),
    "header": (spoiled_header(), None),
    "floats": (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "floats"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_is_refused_in_one_line(kind):
    content, said = BROKEN[kind]
    with pytest.raises(ValueError, match=said) as error:
        decode(content)
    assert "\n" not in str(error.value) and str(error.value)


def test_bytes_flipped_anywhere_never_raise_anything_else():
    random = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        good = encoded(smooth(24, 24), format)
        for _ in range(60):
            file = bytearray(good)
            for place in random.integers(0, len(file), 3):
                file[place] = random.integers(256)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert decode(bytes(file)).shape[2] == 3
                except ValueError:
                    pass


# Sizes


def test_a_picture_of_the_right_size_is_left_alone():
    fitted = fit(picture(16, 24), 16, 24)
    np.testing.assert_array_equal(fitted.pixels, picture(16, 24))
    assert fitted[1:] == (0, 0, False)


@pytest.mark.parametrize("stored", [(96, 131), (131, 96), (300, 80), (40, 50)])
def test_fitting_is_resizing_to_cover_and_then_cropping(stored):
    pixels = smooth(*stored)
    place = np.array([0.3, 0.8])
    fitted = fit(pixels, 48, 64, place)
    scale = max(48 / stored[0], 64 / stored[1])
    covering = round(stored[0] * scale), round(stored[1] * scale)
    whole = Image.fromarray(pixels).resize(covering[::-1], Image.Resampling.LANCZOS)
    top, left = int(0.3 * (covering[0] - 47)), int(0.8 * (covering[1] - 63))
    assert (fitted.top, fitted.left) == (top, left)
    peer = np.asarray(whole)[top : top + 48, left : left + 64].astype(int)
    assert np.abs(fitted.pixels - peer).max() <= 3  # measured: 2, in one pixel of 3,000
    assert fitted.enlarged == (scale > 1)


def test_a_sliver_is_resized_without_its_area():
    fitted = fit(np.full((1, 20000, 3), 7, np.uint8), 512, 512)
    assert fitted.pixels.shape == (512, 512, 3) and (fitted.pixels == 7).all()


# Folders


def test_an_imagefolder_gives_its_pictures_in_its_order(tmp_path):
    root = folder(tmp_path / "a", {"b.png": "second?", "deep/er/a.png": "first? \N{CAT}"})
    source = data.open(root)
    assert isinstance(source, data.Source) and len(source) == 2
    for number, (name, caption) in enumerate(
        [("b.png", "second?"), ("deep/er/a.png", "first? \N{CAT}")]
    ):
        example = source[number]
        np.testing.assert_array_equal(example.pixels, picture(seed=number))
        assert example[1:] == (caption, name)


def test_metadata_in_folders_below_is_relative_to_them(tmp_path):
    folder(tmp_path / "train", {"a.png": "one"})
    folder(tmp_path / "more", {"a.png": "two"})
    source = data.open(tmp_path)
    assert [source[i].caption for i in range(2)] == ["two", "one"]
    assert [source[i].name for i in range(2)] == ["more/a.png", "train/a.png"]


def test_the_caption_column_can_be_chosen(tmp_path):
    root = folder(tmp_path, {"a.png": "one"})
    row = {"file_name": "a.png", "prompt": "said", "text": 3}
    (root / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    assert data.open(root, caption_column="prompt")[0].caption == "said"
    with pytest.raises(InputError, match=r"line 1: .*'text', got 3"):
        data.open(root)
    with pytest.raises(InputError, match=r"'blip', got only 'file_name', 'prompt', 'text'"):
        data.open(root, caption_column="blip")


def test_metadata_may_be_a_table(tmp_path):
    root = folder(tmp_path, {"a.png": ""})
    (root / "metadata.jsonl").unlink()
    (root / "metadata.csv").write_text('file_name,text\na.png,"one, two"\n')
    assert data.open(root)[0].caption == "one, two"


def test_pictures_may_have_their_captions_beside_them(tmp_path):
    for name in ("b.png", "sub/a.JPG"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture()))
        path.with_suffix(".txt").write_text(f"\ufeff about {name}\n")
    (tmp_path / ".hidden.png").write_bytes(b"")
    source = data.open(tmp_path)
    assert [source[i].caption for i in range(2)] == ["about b.png", "about sub/a.JPG"]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\xfa")
    assert "b.png: its caption b.txt is not UTF-8" in skipped(data.open(tmp_path), 0)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(InputError, match=r"b\.png has no caption: write b\.txt"):
        data.open(tmp_path)


def test_pictures_alone_are_enough_without_captions(tmp_path):
    root = folder(tmp_path, {"a.png": "one", "b/c.png": "two"})
    (root / "metadata.jsonl").unlink()
    source = data.open(root, caption_column=None)
    assert [source[i][1:] for i in range(2)] == [("", "a.png"), ("", "b/c.png")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100000, "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"text": "no name"}', "line 2: it needs a file_name, got 'text'"),
        ('{"file_name": 3, "text": ""}', "line 2: it needs a file_name"),
        ('{"file_name": "/etc/passwd", "text": ""}', "leads out of the folder"),
        ('{"file_name": "../a.png", "text": ""}', "leads out of the folder"),
        ('{"file_name": "a.png", "text": null}', "caption in the column 'text', got null"),
    ],
)
def test_metadata_that_cannot_be_right_is_refused_with_its_line(tmp_path, line, said):
    root = folder(tmp_path, {"a.png": "one"})
    with (root / "metadata.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=said) as error:
        data.open(root)
    assert str(root / "metadata.jsonl") in str(error.value)


def test_metadata_in_another_encoding_is_refused(tmp_path):
    root = folder(tmp_path, {"a.png": "one"}, metadata__jsonl=b'{"text": "caf\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        data.open(root)


def test_a_corrupt_image_is_skipped_by_name(tmp_path):
    root = folder(tmp_path, {"good.png": "x", "bad.png": "y", "absent.png": "z", "s/dir.png": ""})
    (root / "bad.png").write_bytes(encoded(picture(64, 64))[:2000])
    (root / "absent.png").unlink()
    (root / "s/dir.png").unlink()
    (root / "s/dir.png").mkdir()
    source = data.open(root)
    assert source[0] is not None
    assert skipped(source, 1).startswith("bad.png: image file is truncated")
    assert skipped(source, 2) == "absent.png: No such file or directory"
    assert skipped(source, 3) == "s/dir.png: Is a directory"
    assert source[1] is None and len(source.skipped) == 3


def test_links_in_circles_end(tmp_path):
    root = folder(tmp_path, {"a.png": "one"})
    os.symlink(root, root / "again")
    assert len(data.open(root)) == 1


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_metadata_that_cannot_be_read_is_refused(tmp_path, name):
    os.symlink(tmp_path / "nowhere", tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} cannot be read: No such file"):
        data.open(tmp_path)


def test_what_holds_no_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither a folder nor a file"):
        data.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no images"):
        data.open(tmp_path)
    with pytest.raises(InputError, match="download or mount"):
        data.open("s3://bucket/a.tar")
    with pytest.raises(InputError, match="no data"):
        data.open([])


def test_a_folder_is_known_by_its_names_and_captions(tmp_path):
    first = data.open(folder(tmp_path / "a", {"a.png": "one"})).digest
    assert data.open(folder(tmp_path / "b", {"a.png": "one"})).digest == first
    assert data.open(folder(tmp_path / "c", {"a.png": "two"})).digest != first


# Tars


def test_what_webdataset_wrote_is_read():
    path = Path(__file__).parent / "reference" / "webdataset-1.0.2.tar"
    source = data.open(path)
    assert len(source) == 3
    for k in range(3):
        example = source[k]
        assert example.pixels.shape == (8, 10, 3)
        assert (example.pixels == [k, 100 + k, 200 + k]).all()
        assert example.caption == f"picture {k}"
        assert example.name == f"{path}:some/{k:04}.png"


def test_tars_follow_each_other(tmp_path):
    for k in range(3):
        shard(tmp_path / f"part-{k:03}.tar", 2 * k, 2)
    (tmp_path / "note.md").write_text("")
    ways = [
        f"{tmp_path}/part-{{000..002}}.tar",
        f"{tmp_path}/part-{{000,001,002}}.tar",
        f"{tmp_path}/part-*.tar",
        tmp_path,
        [f"{tmp_path}/part-{{000..001}}.tar", tmp_path / "part-002.tar"],
    ]
    for where in ways:
        source = data.open(where)
        assert [source[i].caption for i in range(6)] == [f"picture {k}" for k in range(6)]
        assert len(source) == 6


def test_braces_count_as_the_shell_does(tmp_path):
    for name in ("a-8", "a-9", "a-10", "b-8", "b-9", "b-10"):
        (tmp_path / name).write_bytes(b"")
    names = [Path(p).name for p in expand(f"{tmp_path}/{{a,b}}-{{8..10}}")]
    assert names == ["a-8", "a-9", "a-10", "b-8", "b-9", "b-10"]
    with pytest.raises(InputError, match="a-7 is not there"):
        expand(f"{tmp_path}/a-{{7..10}}")
    with pytest.raises(InputError, match="nor are 2 others"):
        expand(f"{tmp_path}/c-{{8..10}}")
    with pytest.raises(InputError, match="counts down"):
        expand(f"{tmp_path}/a-{{9..8}}")
    with pytest.raises(InputError, match="neither a range"):
        expand(f"{tmp_path}/a-{{8}}")
    with pytest.raises(InputError, match="no file matches"):
        expand(f"{tmp_path}/z*")


def test_an_example_is_an_image_and_a_caption_of_one_key(tmp_path):
    image = encoded(picture())
    members = [
        ("a.b.png", image),  # the key ends at the first dot: not an image of "a"
        ("dir.x/a.PNG", image),
        ("dir.x/a.json", b'{"text": "from json", "other": 1}'),
        ("dir.x/a.cls", b"3"),
        ("dir.x/._a.png", b"what a Mac leaves"),
        ("c.jpg", image),
        ("c.txt", b"from text"),
        ("c.json", b"not json, and not needed"),
        ("lonely.txt", b"no image"),
        ("bare.png", image),
    ]
    path = tar(tmp_path / "a.tar", members)
    with pytest.warns(
        UserWarning, match=r"without a caption are left out: 1, .*a\.tar:bare\.png"
    ) as said:
        source = data.open(path)
    assert len(said) == 1
    assert [source[i].caption for i in range(len(source))] == ["from json", "from text"]
    plain = data.open(path, caption_column=None)
    assert [plain[i].caption for i in range(3)] == [""] * 3 and len(plain) == 3


def test_a_tars_broken_members_are_skipped_by_name(tmp_path):
    image = encoded(picture(64, 64))
    members = [
        ("a.png", image[:2000]),
        ("a.txt", b"cut"),
        ("b.jpg", b""),
        ("b.txt", b"empty"),
        ("c.png", image),
        ("c.txt", b"\xff\xfe\xfa"),
        ("d.png", image),
        ("d.json", b"{"),
        ("e.png", image),
        ("e.json", b'{"text": 3}'),
        ("f.png", image),
        ("f.txt", b"good"),
    ]
    path = tar(tmp_path / "a.tar", members)
    source = data.open(path)
    why = ["truncated", "empty", "not UTF-8", "not JSON", "no text in 'text', 'caption'"]
    for index, said in enumerate(why):
        line = skipped(source, index)
        assert line.startswith(f"{path}:{'abcde'[index]}.") and said in line, line
    assert source[5].caption == "good" and len(source.skipped) == 5


def test_a_members_name_is_no_path(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    members = [("../escaped.png", encoded(picture())), ("../escaped.txt", b"x")]
    source = data.open(tar(inside / "a.tar", members))
    assert source[0].caption == "x"
    assert not (tmp_path / "escaped.png").exists()


def test_links_in_tars_are_no_examples(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 1)
    with tarfile.open(path, "a") as file:
        for name in ("link.png", "link.txt"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(info)
    assert len(data.open(path)) == 1


@pytest.mark.filterwarnings("ignore:images without a caption")
def test_a_tar_cut_short_gives_what_is_whole(tmp_path):
    whole = shard(tmp_path / "a.tar", 0, 4).read_bytes()
    second = whole.index(b"0001.png")
    # In a header; in the picture; in the caption's header.
    for size in (second + 100, second + 600, whole.index(b"0001.txt") + 50):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.warns(UserWarning, match=r"a\.tar is cut short or damaged after 000"):
            source = data.open(tmp_path / "a.tar")
        assert [source[i].caption for i in range(len(source))] == ["picture 0"]


def test_a_tar_damaged_in_the_middle_gives_what_is_before(tmp_path):
    content = bytearray(shard(tmp_path / "a.tar", 0, 4).read_bytes())
    second = content.index(b"0002.png")
    content[second : second + 300] = b"\xaa" * 300
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.warns(UserWarning, match=r"damaged after 0001\.txt"):
        assert len(data.open(tmp_path / "a.tar")) == 2


@pytest.mark.parametrize(
    ("suffix", "program"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")]
)
def test_a_compressed_tar_is_refused_with_the_mend(tmp_path, suffix, program):
    path = shard(tmp_path / f"a.tar.{suffix}", 0, 1, f"w:{suffix}")
    with pytest.raises(InputError, match=f"is compressed.*run {program} on it"):
        data.open(path)


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"a page, not found\n" * 100)
    with pytest.raises(InputError, match="is not a tar"):
        data.open(tmp_path / "a.tar")


def test_tars_without_examples_are_refused(tmp_path):
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.warns(UserWarning, match="zero.tar is empty"), pytest.raises(InputError):
        data.open(tmp_path / "zero.tar")
    with pytest.raises(InputError, match="no examples in .*none.tar"):
        data.open(tar(tmp_path / "none.tar", []))
    with pytest.raises(InputError, match="no examples in .*none.tar"):
        data.open(tar(tmp_path / "none.tar", [("a.txt", b"x")]))
    shard(tmp_path / "one.tar", 0, 1)
    with pytest.warns(UserWarning, match="zero.tar is empty"):
        assert len(data.open(f"{tmp_path}/{{zero,none,one}}.tar")) == 1


def test_a_name_twice_in_a_tar_is_refused(tmp_path):
    image = encoded(picture())
    members = [("a.png", image), ("a.txt", b"one"), ("a.png", image)]
    with pytest.raises(InputError, match=r"holds a\.png twice"):
        data.open(tar(tmp_path / "a.tar", members))


def test_a_tar_that_shrinks_while_it_is_read_loses_pictures_by_name(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 3)
    source = data.open(path)
    os.truncate(path, 1024)
    assert "shorter than it was" in skipped(source, 2)


@pytest.mark.parametrize("changed", ["pairs/a.png", "pairs/a.txt", "b.tar"])
def test_files_changed_in_place_are_noticed_by_their_stamp_alone(tmp_path, changed):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs/a.png").write_bytes(encoded(picture()))
    (tmp_path / "pairs/a.txt").write_text("red")
    shard(tmp_path / "b.tar", 0, 2)
    file = tmp_path / changed
    where = file if file.suffix == ".tar" else file.parent
    before = data.open(where)
    assert data.open(where).stamp == before.stamp
    time = file.stat().st_mtime_ns
    content = file.read_bytes()
    file.write_bytes(content)  # as large, later
    os.utime(file, ns=(time, time + 1))
    assert data.open(where).stamp != before.stamp
    assert data.open(where).digest == before.digest
    file.write_bytes(content + b" ")  # at the same time, longer
    os.utime(file, ns=(time, time))
    assert data.open(where).stamp != before.stamp


def test_sources_in_a_row_are_noticed_each(tmp_path):
    paths = [shard(tmp_path / f"{name}.tar", 0, 1) for name in "ab"]
    before = data.open(paths).stamp
    os.utime(paths[1], ns=(1, 1))
    assert data.open(paths).stamp != before


def test_tars_are_known_by_their_members(tmp_path):
    digest = data.open(shard(tmp_path / "a.tar", 0, 2)).digest
    (tmp_path / "b").mkdir()
    assert data.open(shard(tmp_path / "b/a.tar", 0, 2)).digest == digest
    assert data.open(shard(tmp_path / "b/a.tar", 1, 2)).digest != digest
