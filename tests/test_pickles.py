"""Pickled checkpoints: read as torch reads them, and never run."""

import collections
import io
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from sdjax.checkpoints import pickles
from sdjax.errors import InputError


def state():
    """Every dtype and kind of view that a state dict may hold."""
    import torch

    torch.manual_seed(0)
    base = torch.randn(10)
    return collections.OrderedDict(
        {
            "plain": torch.randn(3, 4),
            "transposed": torch.randn(4, 5).T,
            "half": torch.randn(2, 3).half(),
            "bfloat16": torch.randn(7).to(torch.bfloat16),
            "double": torch.randn(2).double(),
            "long": torch.arange(5),
            "int": torch.arange(5, dtype=torch.int32),
            "bool": torch.tensor([True, False]),
            "parameter": torch.nn.Parameter(torch.randn(2, 2)),
            "scalar": torch.tensor(3.0),
            "part": base[3:7],
            "strided": base[::3],
            "tied": base,
            "empty": torch.zeros(0, 4),
        }
    )


def same(read, wanted):
    assert set(read) == set(wanted)
    for key, value in wanted.items():
        array = read[key].read()
        assert array.shape == read[key].shape == tuple(value.shape), key
        want = value.detach().to(dtype=__import__("torch").float64).numpy()
        np.testing.assert_array_equal(array.astype(np.float64), want, err_msg=key)
        read[key].release()


@pytest.mark.parametrize("new", [True, False], ids=["zip", "run"])
@pytest.mark.parametrize("nested", [False, True])
def test_reads_what_torch_saves(tmp_path, new, nested):
    import torch

    wanted = state()
    saved = {"state_dict": wanted, "epoch": 3, "global_step": 875000} if nested else wanted
    torch.save(saved, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new)
    read = pickles.open(tmp_path / "x.ckpt")
    same(read, wanted)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_may_use(tmp_path, protocol):
    import torch

    wanted = state()
    torch.save(wanted, tmp_path / "x.pt", pickle_protocol=protocol)
    same(pickles.open(tmp_path / "x.pt"), wanted)


def test_an_archive_packed_again_with_compression(tmp_path):
    import torch

    torch.save(state(), tmp_path / "x.ckpt")
    with (
        zipfile.ZipFile(tmp_path / "x.ckpt") as old,
        zipfile.ZipFile(tmp_path / "y.ckpt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    same(pickles.open(tmp_path / "y.ckpt"), state())


def write_tar(path, arrays, extra=b"", windows=(), name=None):
    """The tar that torch 0.1.1 wrote, for float32 arrays.

    Its pickles name `torch.FloatStorage`, which torch here still has to find. The tensors are of
    the last of `windows`, tuples of target, root, offset and length, if there are any; `name` is a
    pickled one in place of the storages' own.
    """

    def storage_type(name):
        return b"ctorch\n" + name.encode() + b"\n"

    def pickled(*parts):
        return b"\x80\x02" + b"".join(parts) + b"."

    def number(n):
        return b"J" + struct.pack("<i", n)

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    storages = pickled(number(len(arrays)))
    tensors = pickled(number(len(arrays)))
    state = b"}("
    for i, (key, array) in enumerate(arrays.items()):
        head = (name or number(100 + i), text("cpu"), storage_type("FloatStorage"), b"\x87")
        storages += pickled(*head) + struct.pack("<q", array.size) + array.tobytes()
        storage = 100 + i
        if windows:
            storage, array = windows[-1][0], array[: windows[-1][3]]
        tensors += pickled(number(200 + i), number(storage), storage_type("FloatTensor"), b"\x87")
        strides = [s // 4 for s in array.strides]
        tensors += struct.pack(
            f"<ii{2 * array.ndim + 1}q", array.ndim, 0, *array.shape, *strides, 0
        )
        state += text(key) + number(200 + i) + b"Q"
    entries = [b"(" + b"".join(map(number, window)) + b"t" for window in windows]
    storages += pickled(b"](", *entries, b"e")
    members = {"storages": storages, "tensors": tensors, "pickle": pickled(extra, state, b"u")}
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_the_tar_of_torch_before_0_1_10(tmp_path):
    import torch

    arrays = {
        "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.ones(5, np.float32),
    }
    write_tar(tmp_path / "x.pt", arrays)
    peer = torch.load(tmp_path / "x.pt", weights_only=False)
    read = pickles.open(tmp_path / "x.pt")
    assert set(read) == set(peer) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(peer[key].numpy(), array)
        np.testing.assert_array_equal(read[key].read(), array)


@pytest.mark.parametrize("more", [0, 5000])
def test_a_storage_that_is_a_part_of_a_part(tmp_path, more):
    windows = [(0, 100, 1, 5), (1, 0, 2, 3)] + [(2 + i, 1 + i, 0, 3) for i in range(more)]
    write_tar(tmp_path / "x.pt", {"a": np.arange(6, dtype=np.float32)}, windows=windows)
    assert pickles.open(tmp_path / "x.pt")["a"].read().tolist() == [3, 4, 5]


@pytest.mark.parametrize("new", [True, False], ids=["zip", "run"])
def test_attributes_of_tensors_are_left_out(tmp_path, new):
    import torch

    wanted = {"a": torch.randn(2, 3), "b": torch.nn.Parameter(torch.randn(4, 5).T)}
    wanted["a"].note, wanted["b"].note = "made", {"at": [1, 2.0]}
    torch.save(wanted, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
    assert b"_rebuild_from_type_v2" in (tmp_path / "x.pt").read_bytes()
    same(pickles.open(tmp_path / "x.pt"), wanted)


def lightning():
    """Classes as training checkpoints pickle them, without the packages they come from."""
    import sys
    import types

    names = {
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
        "omegaconf.dictconfig": "DictConfig",
    }
    made = {}
    for module, name in names.items():
        parts = module.split(".")
        for i in range(len(parts)):
            sys.modules.setdefault(
                ".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1]))
            )
        made[name] = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, made[name])
    return made, list(names) + ["pytorch_lightning", "pytorch_lightning.callbacks", "omegaconf"]


def test_lightnings_fields_are_read_past(tmp_path):
    import sys

    import torch

    made, modules = lightning()
    try:
        config = made["DictConfig"]()
        config.__dict__["_content"] = {"base": 1e-4, "items": [1, 2]}
        saved = {
            "state_dict": state(),
            "callbacks": {made["ModelCheckpoint"]: {"best": np.float64(0.1), "at": np.arange(3)}},
            "hyper_parameters": config,
            "lr_schedulers": [collections.defaultdict(list)],
            "loops": None,
            "seen": {1, 2},
            "device": torch.device("cpu"),
            "dtype": torch.float32,
        }
        torch.save(saved, tmp_path / "x.ckpt")
    finally:
        for module in modules:
            sys.modules.pop(module, None)
    same(pickles.open(tmp_path / "x.ckpt"), state())


def archive(path, pickled, storages=None):
    """A zip checkpoint around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def written(module, name, *arguments, protocol=2):
    """A pickle that calls `module.name(*arguments)`, without importing it here."""
    packed = b"".join(b"X" + struct.pack("<I", len(a)) + a.encode() for a in arguments)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(" + packed + b"tR."


ATTACKS = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("__builtin__", "eval"),
    ("subprocess", "Popen"),
    ("importlib", "import_module"),
    ("runpy", "run_path"),
    ("shutil", "rmtree"),
    ("socket", "socket"),
    ("ctypes", "CDLL"),
    ("operator", "attrgetter"),
    ("functools", "partial"),
    ("webbrowser", "open"),
    ("pickle", "loads"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("numpy", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("pip._internal", "main"),
    ("sdjax", "load"),
]


@pytest.mark.parametrize("module, name", ATTACKS)
def test_a_pickle_that_calls_is_refused_by_name(tmp_path, module, name):
    path = archive(tmp_path / "x.ckpt", written(module, name, str(tmp_path / "gone")))
    with pytest.raises(InputError, match=f"'{module}.{name}'.*nothing in it ran"):
        pickles.open(path)


@pytest.mark.parametrize("layout", ["zip", "run", "tar"])
def test_an_attack_beside_good_weights_does_not_run(tmp_path, layout):
    import os

    import torch

    mark = tmp_path / "ran"
    path = tmp_path / "x.ckpt"
    attack = Call(os.system, f"touch {mark}")
    if layout == "tar":
        extra = pickle.dumps(attack, protocol=2)[2:-1] + b"0"
        write_tar(path, {"a": np.ones(3, np.float32)}, extra)
    else:
        saved = {"state_dict": {"a": torch.ones(3)}, "callbacks": attack}
        torch.save(saved, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(InputError, match="system.*nothing in it ran"):
        pickles.open(path)
    assert not mark.exists()


def test_calls_of_strangers_build_nothing(tmp_path):
    """A third party's function is not imported either: it stands for itself."""
    path = archive(tmp_path / "x.ckpt", written("antigravity_not_there", "fly", "now"))
    with pytest.raises(InputError, match="antigravity_not_there.fly.*not a dictionary of tensors"):
        pickles.open(path)


def test_an_object_in_place_of_a_weight_is_refused(tmp_path):
    pickled = b"\x80\x02}X\x01\x00\x00\x00a" + written("somebody", "Tensor")[2:-1] + b"s."
    with pytest.raises(InputError, match="'a' is an object, not a tensor"):
        pickles.open(archive(tmp_path / "x.ckpt", pickled))


def tensor_pickle(shape=(2,), stride=(1,), offset=0, numel=2, key="0", dtype=None):
    """The pickle of {"a": tensor} with any claims about its sizes."""

    def number(n):
        return b"\x8a\x0a" + n.to_bytes(10, "little", signed=True)

    def text(s):
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    def sizes(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += number(numel) + b"tQ"
    version = b"3" if dtype else b"2"
    built = b"ctorch._utils\n_rebuild_tensor_v" + version + b"\n(" + storage + number(offset)
    built += sizes(shape) + sizes(stride) + b"\x89ccollections\nOrderedDict\n)R"
    built += b"ctorch\n" + dtype + b"\ntR" if dtype else b"tR"
    return b"\x80\x02}" + text("a") + built + b"s."


def test_the_crafted_tensor_is_good_without_a_lie(tmp_path):
    path = archive(tmp_path / "x.ckpt", tensor_pickle(), {"0": bytes(8)})
    assert pickles.open(path)["a"].read().tolist() == [0, 0]


LIES = {
    "shape outside": dict(shape=(3,)),
    "stride outside": dict(stride=(2,)),
    "offset outside": dict(offset=1),
    "negative offset": dict(offset=-1),
    "negative stride": dict(stride=(-1,)),
    "negative shape": dict(shape=(-2,)),
    "stride of another rank": dict(stride=(1, 1)),
    "petabytes by stride 0": dict(shape=(2**50,), stride=(0,)),
    "overflow": dict(shape=(2**40, 2**40), stride=(0, 0)),
    "storage larger than its entry": dict(numel=3),
    "petabytes in a storage": dict(numel=2**50, shape=(2**50,)),
    "negative storage": dict(numel=-1),
    "no such storage": dict(key="1"),
    "a storage outside the archive": dict(key="../0"),
    "wider numbers than its storage's": dict(dtype=b"float64"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, lie):
    path = archive(tmp_path / "x.ckpt", tensor_pickle(**LIES[lie]), {"0": bytes(8)})
    with pytest.raises(InputError) as caught:
        pickles.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def unchecked():
    """Annotations are not checked: that takes seconds for a million opcodes."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


TOO_MUCH = {
    "a memo of 2^31": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a string of 2^60": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "bytes of 2^63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.",
    "a bytearray of 2^40": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "an endless integer": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "nothing on the stack": b"\x80\x02R.",
    "no mark": b"\x80\x02t.",
    "no end": b"\x80\x02](((",
    "no such memo": b"\x80\x02h\x05.",
    "an unknown opcode": b"\x80\x02\xff.",
    "an extension": b"\x80\x02\x82\x01.",
    "an unhashable key": b"\x80\x02}]]s.",
    "items for a number": b"\x80\x02K\x01K\x01a.",
    "a call of a number": b"\x80\x02K\x01)R.",
    "the same key twice": b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.",
    "a deep tuple as a key": b"\x80\x02})" + b"\x85" * 300_000 + b"K\x01s.",
    "doubled pairs": b"\x80\x02](" + b"K\x01K\x02\x86" * 1000 + b"eq\x00"
    + b"ccollections\nOrderedDict\nh\x00\x85R0" * 5000 + b"N.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", TOO_MUCH)
def test_a_pickle_that_asks_for_too_much_is_refused(tmp_path, bomb, unchecked):
    path = archive(tmp_path / "x.ckpt", TOO_MUCH[bomb])
    with pytest.raises(InputError) as caught:
        pickles.open(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


CALLS = {
    "many arguments": b"(" + b"K\x01" * 1000 + b"tq\x00ctorch._utils\n_rebuild_parameter\nh\x00R0",
    "many copies": b"](" + b"K\x01" * 1000 + b"eq\x000" + b"ctorch\nSize\nh\x00\x85\x810" * 2000,
    "a tensor of no tensor's": b"ctorch._tensor\n_rebuild_from_type_v2\n"
    + b"(ccollections\nOrderedDict\nN)NtR0",
}  # fmt: skip


@pytest.mark.parametrize("calls", CALLS)
def test_calls_that_no_checkpoint_makes_are_refused_beside_a_good_tensor(tmp_path, calls):
    pickled = b"\x80\x02" + CALLS[calls] + tensor_pickle()[2:]
    path = archive(tmp_path / "x.ckpt", pickled, {"0": bytes(8)})
    with pytest.raises(InputError, match="the pickle cannot be read"):
        pickles.open(path)


DEEP = b")" + b"\x85" * 50_000
"""A nest of tuples that cannot be printed."""


@pytest.mark.parametrize("place", ["size", "key", "name"])
def test_what_cannot_be_printed_is_refused_unprinted(tmp_path, place, unchecked):
    path = tmp_path / "x.ckpt"
    if place == "size":
        storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
        archive(path, b"\x80\x02" + storage + b"X\x03\x00\x00\x00cpu" + DEEP + b"tQ.")
    elif place == "key":
        head = [pickle.dumps(value, 2) for value in (pickles.MAGIC, 1001, {}, {})]
        path.write_bytes(b"".join(head) + b"\x80\x02](" + DEEP + b"e.")
    else:
        write_tar(path, {"a": np.ones(3, np.float32)}, name=DEEP)
    with pytest.raises(InputError, match="x.ckpt"):
        pickles.open(path)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "run"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, new, part):
    import torch

    torch.save(state(), tmp_path / "x.ckpt", _use_new_zipfile_serialization=new)
    data = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(data[: int(len(data) * part)])
    with pytest.raises(InputError, match="x.ckpt.*(cut short|damaged|cannot be read)"):
        pickles.open(tmp_path / "x.ckpt")


def test_a_zip_with_an_entry_twice_is_refused(tmp_path):
    path = archive(tmp_path / "x.ckpt", tensor_pickle(), {"0": bytes(8)})
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning):
        file.writestr("archive/data/0", bytes(8))
    with pytest.raises(InputError, match="'archive/data/0' twice"):
        pickles.open(path)


def test_a_big_endian_archive_is_refused(tmp_path):
    path = archive(tmp_path / "x.ckpt", tensor_pickle(), {"0": bytes(8)})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "big")
    with pytest.raises(InputError, match="big-endian"):
        pickles.open(path)


def test_a_compressed_storage_is_inflated_no_further_than_its_tensor(tmp_path):
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_pickle())
        file.writestr("archive/data/0", bytes(50_000_000))
    assert pickles.open(path)["a"].read().nbytes == 8


def test_a_compressed_storage_that_ends_early_is_refused(tmp_path):
    """The archive claims 80 bytes for a stream of 8 whose checksum is right."""
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_pickle(shape=(20,), numel=20))
        file.writestr("archive/data/0", bytes(8))
        file.getinfo("archive/data/0").file_size = 80
    with pytest.raises(InputError, match="'archive/data/0' ends after 8 of 80 bytes"):
        pickles.open(path)["a"].read()


def test_a_part_of_a_compressed_storage_is_refused(tmp_path):
    window = b"(X\x01\x00\x00\x00wK\x00K\x02t"
    pickled = tensor_pickle().replace(b"tQ", window[:-1] + b"ttQ", 1)
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/data/0", bytes(8))
    with pytest.raises(InputError, match="'a' is a part of a storage that is compressed"):
        pickles.open(path)


def test_an_encrypted_entry_is_refused(tmp_path):
    path = archive(tmp_path / "x.ckpt", tensor_pickle(), {"0": bytes(8)})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", "little")
        file.getinfo("archive/byteorder").flag_bits |= 1
    with pytest.raises(InputError, match="x.ckpt is encrypted"):
        pickles.open(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_unusual_compression_is_refused(tmp_path, method):
    path = archive(tmp_path / "x.ckpt", tensor_pickle())
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(8), compress_type=method)
    with pytest.raises(InputError, match="'archive/data/0' is compressed by an unusual method"):
        pickles.open(path)


@pytest.mark.parametrize("data", [b"GGUF....", b"\x89HDF\r\n", b"hello", b"\x80\x02K\x05."])
def test_another_format_is_refused(tmp_path, data):
    (tmp_path / "x.ckpt").write_bytes(data)
    with pytest.raises(InputError, match="x.ckpt"):
        pickles.open(tmp_path / "x.ckpt")
