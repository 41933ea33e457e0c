"""The house stands: every import in sdjax goes down, or sideways on its own floor."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent / "sdjax"

FLOORS = (
    {"types", "errors", "config", "bundled"},
    {"diffusion", "models", "images"},
    {"parallel"},
    {"checkpoints", "model", "text"},
    {"tasks"},
    {"training"},
    {"jobs", "lab"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

# Sideways is allowed on a floor, but for these, which must not know each other.
STRANGERS = {"diffusion", "models", "images"}

# Only parallel.py knows that devices exist.
DEVICE_WORDS = {
    "NamedSharding",
    "device_count",
    "device_put_replicated",
    "device_put_sharded",
    "devices",
    "local_device_count",
    "local_devices",
    "make_mesh",
    "pmap",
    "process_count",
    "process_index",
    "shard_map",
}


class Import(NamedTuple):
    file: Path
    line: int
    module: str  # absolute and dotted: sdjax.diffusion.schedules

    def __str__(self) -> str:
        return f"sdjax/{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


FILES = sorted(ROOT.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8"), str(file)) for file in FILES}


def room(file: Path) -> str:
    """The first name under sdjax: a package or a single file; '' for sdjax/__init__.py."""
    name = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def package(file: Path) -> list[str]:
    return ["sdjax", *file.relative_to(ROOT).parts[:-1]]


def imports(file: Path) -> Iterator[Import]:
    """Every import, at the top or inside a function, relative ones made absolute."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = package(file)
            base = parts[: len(parts) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(file, node.lineno, f"{module}.{alias.name}")


def inside() -> Iterator[tuple[str, str, Import]]:
    """(room, room imported, import) for every import of sdjax by sdjax, its front door apart."""
    for file in FILES:
        for found in imports(file):
            names = found.module.split(".")
            if names[0] == "sdjax" and room(file):
                yield room(file), names[1] if len(names) > 1 else "", found


def outside(*rooms: str) -> Iterator[Import]:
    for file in FILES:
        if not rooms or room(file) in rooms:
            yield from (found for found in imports(file) if found.module.split(".")[0] != "sdjax")


def test_every_room_has_a_floor():
    rooms = {room(file) for file in FILES} - {"", "__main__"}
    assert rooms <= LEVEL.keys(), f"give these a floor: {sorted(rooms - LEVEL.keys())}"


def test_imports_go_down():
    upward = [
        str(found)
        for here, there, found in inside()
        if here != "__main__" and LEVEL[here] < LEVEL.get(there, LEVEL["cli"])
    ]
    assert not upward, "\n".join(upward)


def test_the_first_floors_rooms_do_not_know_each_other():
    known = [
        str(found)
        for here, there, found in inside()
        if here in STRANGERS and there in STRANGERS and here != there
    ]
    assert not known, "\n".join(known)


def test_only_the_top_floor_imports_the_front_door():
    through = [
        str(found)
        for here, there, found in inside()
        if there not in LEVEL and here not in ("cli", "__main__")
    ]
    assert not through, "\n".join(through)


def test_diffusion_imports_jax_numpy_and_scipy_only():
    allowed = {"jax", "jaxtyping", "numpy", "scipy"} | set(__import__("sys").stdlib_module_names)
    found = [str(i) for i in outside("diffusion") if i.module.split(".")[0] not in allowed]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("forbidden", ["torch", "diffusers", "transformers", "safetensors"])
def test_peers_are_never_imported(forbidden: str):
    found = [str(i) for i in outside() if i.module.split(".")[0] == forbidden]
    assert not found, "\n".join(found)


def test_models_never_touch_files():
    files = {"io", "os", "pathlib", "mmap", "tempfile", "urllib"}
    found = [str(i) for i in outside("models") if i.module.split(".")[0] in files]
    opened = [
        f"sdjax/{file.relative_to(ROOT)}:{node.lineno} opens a file"
        for file in FILES
        if room(file) == "models"
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Name) and node.id == "open"
    ]
    assert not found + opened, "\n".join(found + opened)


def test_only_parallel_names_devices():
    named = [
        f"sdjax/{file.relative_to(ROOT)}:{node.lineno} names jax.{node.attr}"
        for file in FILES
        if room(file) != "parallel"
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.Attribute)
        and node.attr in DEVICE_WORDS
        and ast.unparse(node.value).split(".")[0] == "jax"
    ]
    imported = [
        str(i)
        for i in outside()
        if room(i.file) != "parallel"
        and i.module.startswith("jax.")
        and i.module.rsplit(".", 1)[-1] in DEVICE_WORDS
    ]
    assert not named + imported, "\n".join(named + imported)


def test_no_promise_is_left_in_the_code():
    words = ("TODO", "FIXME", "XXX", "raise NotImplementedError")
    left = [
        f"sdjax/{file.relative_to(ROOT)}:{number} {line.strip()}"
        for file in FILES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if any(word in line for word in words)
    ]
    assert not left, "\n".join(left)


def test_a_file_is_at_most_400_lines():
    long = {
        str(file.relative_to(ROOT)): lines
        for file in FILES
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
