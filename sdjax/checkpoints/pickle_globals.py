"""What a pickle's globals stand for: tensors, their storages, a few containers, and inert names.

Globals of the standard library, of torch and of numpy that are not in the tables end the reading,
since a checkpoint has no use for them and an attack has; those of other packages (Lightning's
callbacks, OmegaConf's configs) become inert stand-ins that swallow what is done to them.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sdjax.checkpoints.tensors import BFLOAT16
from sdjax.errors import InputError

ARGUMENTS = 16
"""The most that a call which is carried out may have; torch's have up to eight."""


@dataclass(eq=False)
class Inert:
    """A stand-in for an object that is not built: named, and nothing else."""

    name: str


class Function(NamedTuple):
    """One of the few calls that are carried out."""

    name: str
    call: Callable[..., Any]
    flat: bool = False


class StorageType(NamedTuple):
    """A torch storage class; `dtype` None for bytes without one."""

    dtype: np.dtype | None


@dataclass(eq=False)
class Storage:
    """A run of numbers: placed in the file by its container, or a window of another."""

    key: str
    dtype: np.dtype | None
    numel: int
    start: int | None = None
    data: Callable[[], np.ndarray] | None = None
    root: "Storage | None" = None
    skip: int = 0

    @property
    def begin(self) -> int | None:
        """The byte where it begins in the file; None when it is compressed."""
        if self.root is None:
            return self.start
        if self.root.begin is None or self.dtype is None:
            return None
        return self.root.begin + self.skip * self.dtype.itemsize


@dataclass(eq=False)
class View:
    """A tensor: part of a storage, checked to lie inside it."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def rebuild(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> View:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return view(storage, storage.dtype, offset, shape, stride)


def rebuild_typed(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> View:
    """`torch._utils._rebuild_tensor_v3`: a view of untyped bytes; the dtype comes last."""
    if not isinstance(storage, Storage) or len(rest) < 3 or not isinstance(rest[2], StorageType):
        raise ValueError("a tensor without a storage")
    dtype = rest[2].dtype
    if storage.dtype is not None and storage.dtype != dtype:
        raise ValueError("a tensor of another dtype than its storage")
    return view(storage, dtype, offset, shape, stride)


def rebuild_kind(function: Any, kind: Any, arguments: Any, *rest: Any) -> View:
    """`torch._tensor._rebuild_from_type_v2`: a tensor with attributes, which are left out."""
    known = isinstance(function, Function) and function.name == "tensor"
    if not known or not isinstance(arguments, tuple) or len(arguments) > ARGUMENTS:
        raise ValueError("a tensor that is made in an unknown way")
    return function.call(*arguments)


def view(storage: Storage, dtype: np.dtype | None, offset: Any, shape: Any, stride: Any) -> View:
    """A tensor whose every element is one of its storage's own."""
    numbers = [offset, *shape, *stride]
    if any(type(n) is not int or not 0 <= n < 2**62 for n in numbers) or len(shape) > 32:
        raise ValueError("a tensor whose sizes are no sizes")
    if dtype is None or len(shape) != len(stride):
        raise ValueError("a tensor without a dtype or with a stride of another rank")
    size = 1
    for length in shape:
        size *= length
    numel = storage.numel
    if storage.dtype is None:
        numel //= dtype.itemsize
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if size and (last >= numel or size > numel):
        raise ValueError(f"a tensor of shape {list(shape)[:8]} outside its storage of {numel}")
    return View(storage, dtype, offset, tuple(shape), tuple(stride))


def first(value: Any, *rest: Any) -> Any:
    """`_rebuild_parameter`: a parameter is its data."""
    return value


def mapping(items: Any = (), *rest: Any) -> dict:
    """`OrderedDict` and `defaultdict`: from pairs, as Python 2 wrote them, or empty."""
    built: dict = {}
    for pair in items if isinstance(items, list | tuple) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("a dictionary of things that are no pairs")
        insert(built, pair[0], pair[1])
    return built


_PLAIN = str | int | float | bytes | None | Inert


def insert(built: dict, key: Any, value: Any) -> None:
    """Set a new key; one that is costly to hash, such as a nested tuple, stands for itself."""
    if isinstance(key, int) and abs(key) >= 2**64 or not isinstance(key, _PLAIN):
        key = Inert("a key")
    if key in built:
        raise ValueError(f"the key {str(key)[:80]!r} twice")
    built[key] = value


_FLOATS = {"Half": np.float16, "BFloat16": BFLOAT16, "Float": np.float32, "Double": np.float64}
_OTHERS = {
    "Long": np.int64,
    "Int": np.int32,
    "Short": np.int16,
    "Char": np.int8,
    "Byte": np.uint8,
    "Bool": np.bool_,
    "ComplexFloat": np.complex64,
    "ComplexDouble": np.complex128,
    "Float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "Float8_e5m2": ml_dtypes.float8_e5m2,
}
_DTYPES = {
    "float16 half": np.float16,
    "bfloat16": BFLOAT16,
    "float32 float": np.float32,
    "float64 double": np.float64,
    "int64 long": np.int64,
    "int32 int": np.int32,
    "int16 short": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}

GLOBALS: dict[str, Any] = {
    "torch._utils._rebuild_tensor": Function("tensor", rebuild),
    "torch._utils._rebuild_tensor_v2": Function("tensor", rebuild),
    "torch._utils._rebuild_tensor_v3": Function("tensor", rebuild_typed),
    "torch._tensor._rebuild_from_type_v2": Function("tensor of a kind", rebuild_kind),
    "torch._utils._rebuild_parameter": Function("parameter", first),
    "torch._utils._rebuild_parameter_with_state": Function("parameter", first),
    "torch.Size": Function("size", tuple, flat=True),
    "collections.OrderedDict": Function("dict", mapping, flat=True),
    "torch.storage.UntypedStorage": StorageType(None),
    "torch.UntypedStorage": StorageType(None),
}
for _name, _dtype in {**_FLOATS, **_OTHERS}.items():
    GLOBALS[f"torch.{_name}Storage"] = StorageType(np.dtype(_dtype))
    GLOBALS[f"torch.cuda.{_name}Storage"] = StorageType(np.dtype(_dtype))
for _names, _dtype in _DTYPES.items():
    for _name in _names.split():
        GLOBALS[f"torch.{_name}"] = StorageType(np.dtype(_dtype))

_HARMLESS = {
    "torch": "device Tensor nn.parameter.Parameter nn.parameter.Buffer serialization._get_layout "
    "FloatTensor HalfTensor BFloat16Tensor DoubleTensor LongTensor IntTensor ByteTensor "
    "cuda.FloatTensor cuda.HalfTensor cuda.LongTensor",
    "numpy": "dtype ndarray core.multiarray.scalar core.multiarray._reconstruct "
    "_core.multiarray.scalar _core.multiarray._reconstruct float64 float32 int64 int32 bool_ "
    "dtypes.Float64DType dtypes.Float32DType dtypes.Int64DType",
    "collections": "defaultdict Counter deque",
    "builtins": "set frozenset list dict tuple int float str bool bytes bytearray complex object",
    "__builtin__": "set frozenset list dict tuple int float str bool object long unicode",
    "_codecs": "encode",
    "copyreg": "_reconstructor",
    "copy_reg": "_reconstructor",
    "typing": "Any Dict List Union Optional Tuple",
    "argparse": "Namespace",
    "pathlib": "Path PosixPath PurePosixPath WindowsPath _local.PosixPath",
    "datetime": "datetime date timedelta timezone",
    "enum": "Enum",
}
HARMLESS = {f"{module}.{name}" for module, names in _HARMLESS.items() for name in names.split()}
WATCHED = sys.stdlib_module_names | {
    *("torch", "numpy", "jax", "sdjax", "pip", "setuptools", "pkg_resources", "IPython"),
    *("__builtin__", "commands", "copy_reg", "cPickle", "dill", "cloudpickle", "joblib"),
}
"""Packages whose globals are refused unless they are listed above: Python's own come first."""


def look_up(module: str, name: str, path: Path) -> Any:
    """What stands for a global.

    Raises:
        InputError: for one that a checkpoint of weights has no use for.
    """
    if len(module) + len(name) > 500:
        raise ValueError("a global with an endless name")
    full = f"{module}.{name}"
    if full in GLOBALS:
        return GLOBALS[full]
    if full not in HARMLESS and module.split(".")[0] in WATCHED:
        raise InputError(
            f"{path}: the pickle asks for {full[:100]!r}, which has no place among weights, so it "
            "was not loaded and nothing in it ran: get the weights as safetensors from a source "
            "you trust"
        )
    return Inert(full)
