"""`inspect`: what a checkpoint is, from its headers, and its files' sha256."""

import os
from dataclasses import dataclass
from pathlib import Path

from sdjax.checkpoints import digest
from sdjax.checkpoints.components import Network
from sdjax.checkpoints.finding import find
from sdjax.checkpoints.loading import schedule


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint."""

    name: str
    kind: str
    parameters: int
    dtypes: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class File:
    """One file of weights."""

    path: Path
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Report:
    """What `inspect` found; `str` gives it as text for people."""

    path: Path
    layout: str
    family: str
    prediction: str
    parts: tuple[Part, ...]
    files: tuple[File, ...]
    note: str = ""

    @property
    def parameters(self) -> int:
        """Number of parameters of all networks."""
        return sum(part.parameters for part in self.parts)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the weights, sorted by name."""
        return tuple(sorted({dtype for part in self.parts for dtype in part.dtypes}))

    @property
    def sha256(self) -> str:
        """One hash for all: a single file's own, or that of the files' hashes in order."""
        return digest.combined([file.sha256 for file in self.files])

    def __str__(self) -> str:
        """Several lines, aligned."""
        rows = [
            ("path", str(self.path)),
            ("layout", self.layout),
            ("family", self.family),
            ("prediction", self.prediction),
            ("dtype", ", ".join(self.dtypes)),
            ("parameters", f"{self.parameters:,}"),
        ]
        rows += [
            (f"  {part.name}", f"{part.parameters:,} ({part.kind}, {', '.join(part.dtypes)})")
            for part in self.parts
        ]
        base = self.path if self.path.is_dir() else self.path.parent
        for file in self.files:
            shown = file.path.relative_to(base) if file.path.is_relative_to(base) else file.path
            rows.append(("sha256", f"{file.sha256} {shown} ({file.nbytes:,} bytes)"))
        if self.note:
            rows.append(("note", self.note))
        return "\n".join(f"{name:<16}{value}" for name, value in rows)


def inspect(
    where: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    variant: str | None = None,
) -> Report:
    """Say what a checkpoint is: its headers are read and checked, and its files hashed.

    Args:
        where: as for `load`.
        config: as for `load`.
        variant: as for `load`.

    Raises:
        InputError: as `load`, but for what only the weights themselves show.
    """
    source = find(where, config=config, variant=variant)
    parts = tuple(part(name, network) for name, network in source.networks.items())
    paths = {t.path: None for n in source.networks.values() for t in n.tensors.values()}
    prediction = schedule(source).prediction if source.scheduler else "none"
    folder = source.path.is_dir()
    suffix = "safetensors" if source.path.suffix == ".safetensors" else "pickle"
    return Report(
        path=source.path,
        layout="diffusers folder" if folder else f"single file, {suffix}",
        family=source.family or "autoencoder",
        prediction=prediction,
        parts=parts,
        files=tuple(File(path, path.stat().st_size, digest.sha256(path)) for path in paths),
        note=source.note,
    )


def part(name: str, network: Network) -> Part:
    """One network's line."""
    tensors = network.tensors.values()
    return Part(
        name=name,
        kind=network.config.kind,
        parameters=sum(tensor.size for tensor in tensors),
        dtypes=tuple(sorted({tensor.dtype.name for tensor in tensors})),
        nbytes=network.nbytes,
    )
