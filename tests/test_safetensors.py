"""The safetensors reader believes nothing, and the writer's bytes are the reference's."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from sdjax.checkpoints import safetensors
from sdjax.errors import InputError


def craft(path, header, data=b"", length=None):
    """A file with any header (bytes, or what becomes JSON) and any claim of its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def sample():
    import torch

    return {
        "b.weight": torch.randn(3, 4),
        "a.weight": torch.randn(5).to(torch.bfloat16),
        "half": torch.randn(2, 2, 2).half(),
        "double": torch.randn(1, 3).double(),
        "ids": torch.arange(7),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "naïve.✓": torch.ones(1),
    }


def test_reads_what_the_reference_writes(tmp_path):
    from safetensors.torch import save_file

    tensors = sample()
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt", "note": "ü"})
    read = safetensors.open(tmp_path / "x.safetensors")
    assert read.metadata == {"format": "pt", "note": "ü"}
    assert set(read) == set(tensors)
    for key, tensor in tensors.items():
        array = read[key].read()
        assert array.shape == read[key].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())
    assert read["a.weight"].dtype == ml_dtypes.bfloat16


def test_writes_the_reference_writers_bytes(tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = sample()
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tensors, theirs, {"format": "pt"})
    read = safetensors.open(theirs)
    safetensors.write(ours, [safetensors.entry(tensor) for tensor in read.values()])
    assert ours.read_bytes() == theirs.read_bytes()
    assert set(load_file(ours)) == set(tensors)
    assert os.listdir(tmp_path) == [theirs.name, ours.name] or len(os.listdir(tmp_path)) == 2


def test_a_released_view_reads_the_same_again(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.arange(300_000, dtype=np.float32)
    safetensors.write(path, [safetensors.Entry("x", array.shape, array.dtype, lambda: array)])
    tensor = safetensors.open(path)["x"]
    view = tensor.read()
    tensor.release()
    np.testing.assert_array_equal(view, array)
    assert not view.flags.writeable


def test_lazy_slices_transposes_and_reshapes(tmp_path):
    path = tmp_path / "x.safetensors"
    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    safetensors.write(path, [safetensors.Entry("x", array.shape, array.dtype, lambda: array)])
    tensor = safetensors.open(path)["x"]
    part = tensor.rows(2, 4, "y").transposed()
    assert (part.shape, part.name) == ((4, 2), "y")
    np.testing.assert_array_equal(part.read(), array[2:4].T)
    assert tensor.reshaped((6, 4, 1, 1)).read().shape == (6, 4, 1, 1)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")

    def fail():
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        safetensors.write(path, [safetensors.Entry("x", (1,), np.dtype(np.float32), fail)])
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]


DATA = bytes(8)
LIES = {
    "overlap": ({"a": one(), "b": one(offsets=(4, 12))}, bytes(12), "'b' overlaps"),
    "same place": ({"a": one(), "b": one()}, DATA, "'b' overlaps"),
    "gap": ({"a": one(), "b": one(offsets=(12, 20))}, bytes(20), "'b' leaves a gap"),
    "gap at the start": ({"a": one(offsets=(4, 12))}, bytes(12), "'a' leaves a gap"),
    "out of range": ({"a": one(offsets=(0, 8))}, bytes(4), "cut short.*'a'"),
    "far out of range": ({"a": one(offsets=(2**40, 2**40 + 8))}, DATA, "cut short.*'a'"),
    "trailing bytes": ({"a": one()}, bytes(9), "1 bytes follow"),
    "backwards": ({"a": one(offsets=(8, 0))}, DATA, "'a'.*takes 8 bytes"),
    "negative offset": ({"a": one(offsets=(-8, 0))}, DATA, "'a'.*data_offsets"),
    "negative size": ({"a": one(shape=(-2,))}, DATA, "'a'.*shape"),
    "wrong size": ({"a": one(shape=(3,))}, DATA, "'a'.*takes 12 bytes, not 8"),
    "overflow": ({"a": one(shape=(2**32, 2**32, 2**32))}, DATA, "'a'.*overflows"),
    "overflow to 0": ({"a": one(shape=(2**62, 4), offsets=(0, 0))}, b"", "'a'.*overflows"),
    "huge integer": ({"a": one(shape=(10**400,))}, DATA, "'a'.*shape"),
    "float size": ({"a": one(shape=(2.0,))}, DATA, "'a'.*shape"),
    "bool size": ({"a": one(shape=(True, 2))}, DATA, "'a'.*shape"),
    "many axes": ({"a": one(shape=(1,) * 1000 + (2,))}, DATA, "'a'.*shape"),
    "unknown dtype": ({"a": one(dtype="F4")}, DATA, "'a'.*dtype 'F4'"),
    "dtype that is no string": ({"a": one(dtype=[])}, DATA, "'a'.*dtype"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA, "'a'.*exactly"),
    "extra field": ({"a": one() | {"x": 1}}, DATA, "'a'.*exactly"),
    "entry that is no object": ({"a": 3}, b"", "'a'.*exactly"),
    "metadata that is no object": ({"__metadata__": 3}, b"", "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"a": 3}}, b"", "__metadata__"),
    "array": ([], b"", "must be a JSON object"),
    "not JSON": (b"{nonsense", b"", "not JSON"),
    "cut JSON": (b'{"a": {"dtype', b"", "not JSON"),
    "deep JSON": (b'{"a":' + b"[" * 200_000, b"", "not JSON.*too deep"),
    "endless number": (b'{"a":' + b"1" * 10_000 + b"}", b"", "not JSON"),
    "invalid UTF-8": (b'{"\xff\xfe": 1}', b"", "not UTF-8 at byte 10"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), b"", "not UTF-8"),
    "duplicate key": (
        b'{"a":' + json.dumps(one()).encode() + b',"a":' + json.dumps(one()).encode() + b"}",
        DATA,
        "'a' twice",
    ),
    "duplicate field": (
        b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
        DATA,
        "'dtype' twice",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    header, data, words = LIES[lie]
    path = craft(tmp_path / "x.safetensors", header, data)
    with pytest.raises(InputError, match=words) as caught:
        safetensors.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_header_over_100_mb_is_refused_by_its_length_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(200_000_000)  # sparse: nothing of it could be read as JSON
    with pytest.raises(InputError, match="header claims 100000001 bytes and at most 100000000"):
        safetensors.open(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**62])
def test_an_absurd_header_length_is_refused(tmp_path, length):
    with pytest.raises(InputError, match="at most 100000000"):
        safetensors.open(craft(tmp_path / "x.safetensors", {}, length=length))


@pytest.mark.parametrize("size", [1, 7, 8, 20, 100, 150])
def test_a_truncated_file_is_refused(tmp_path, size):
    path = craft(tmp_path / "x.safetensors", {"a": one(shape=(100,), offsets=(0, 400))}, bytes(400))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="cut short"):
        safetensors.open(path)
