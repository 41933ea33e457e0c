"""`compare`: samplers on a problem, at equal numbers of evaluations."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdjax.diffusion.trajectories import may_draw
from sdjax.errors import InputError
from sdjax.lab.cost import afforded, meter
from sdjax.lab.distances import relative_error, sliced_wasserstein
from sdjax.lab.problems import Problem
from sdjax.types import Sampler

_PICTURED = 1500
_DRAWS = 8

Progress = Callable[[int, int, str], None]


class Cell(NamedTuple):
    """One sampler, spacing and number of evaluations."""

    sampler: str
    spacing: str
    nfe: int
    """Evaluations of the network that were allowed."""
    evaluations: int
    """Those that were made, at most as many; of a sampler that chooses its steps, their mean."""
    steps: int
    error: float | None
    """From what is right for the same noise, as a share of its deviation; None where a sampler adds
    noise of its own."""
    distance: float | None
    """Sliced Wasserstein distance from draws of the data, or from what is right."""
    attributes: float | None
    """The share of samples that are as asked, where that can be measured."""
    picture: np.ndarray
    """uint8 [h, w, 3]."""


class Comparison(NamedTuple):
    """What `compare` found: cells in the order of samplers, spacings, evaluations."""

    problem: str
    about: str
    samples: int
    """In each cell."""
    cells: tuple[Cell, ...]
    orders: Mapping[tuple[str, str], float]
    """By (sampler, spacing), for solvers of the ODE: see `Problem.order`."""
    chance: float | None
    """The distance between two sets of draws of the data, in the mean: less says nothing."""
    right: np.ndarray
    """What is right, as a picture."""

    def csv(self) -> str:
        """One line a cell."""
        out = io.StringIO()
        table = csv.writer(out, lineterminator="\n")
        table.writerow(
            ["problem", "sampler", "spacing", "nfe", "evaluations", "steps", "error", "distance"]
            + ["attributes", "order"]
        )
        for cell in self.cells:
            order = self.orders.get((cell.sampler, cell.spacing))
            numbers = (cell.error, cell.distance, cell.attributes, order)
            row = [self.problem, *cell[:5]]
            table.writerow([*row, *("" if n is None else f"{n:.6g}" for n in numbers)])
        return out.getvalue()

    def markdown(self) -> str:
        """A table a spacing, its samplers by their error, or else distance, at most evaluations."""
        tables = [_table(self, s) for s in dict.fromkeys(c.spacing for c in self.cells)]
        chance = (
            ""
            if self.chance is None
            else f" Two sets of draws are {self.chance:.2g} apart, in the mean."
        )
        head = (
            f"# Samplers on {self.problem}\n\n{self.about}\n{self.samples:,} samples in each cell, "
            "all from the same noise. Error: from what is right for it, as a share of the "
            f"deviation.\nDistance: sliced Wasserstein, from draws of the data.{chance}\n"
            "The numbers in the head are evaluations of the network that were allowed.\n"
        )
        return "\n".join([head, *tables])

    def html(self) -> str:
        """One page that needs nothing beside it."""
        from sdjax.lab.page import page

        return page(self)

    def ranked(self, spacing: str) -> list[str]:
        """Samplers by their error where most evaluations were allowed; then those without one, by
        distance.
        """
        last: dict[str, Cell] = {}
        for cell in self.cells:
            if cell.spacing == spacing and cell.nfe >= getattr(last.get(cell.sampler), "nfe", 0):
                last[cell.sampler] = cell

        def key(name: str) -> tuple[bool, float]:
            cell = last[name]
            value = cell.distance if cell.error is None else cell.error
            return cell.error is None, math.inf if value is None else value

        return sorted(last, key=key)

    def save(self, where: str | Path) -> Path:
        """Write `comparison.csv` and `index.html` into a folder, or the tables alone to a .md file.

        Gives the path of what is to be looked at.
        """
        where = Path(where)
        try:
            if where.suffix == ".md":
                where.parent.mkdir(parents=True, exist_ok=True)
                where.write_text(self.markdown(), encoding="utf-8")
                return where
            where.mkdir(parents=True, exist_ok=True)
            (where / "comparison.csv").write_text(self.csv(), encoding="utf-8")
            (where / "index.html").write_text(self.html(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"no comparison can be written to {where}: {error.strerror}") from None
        return where / "index.html"


def compare(
    problem: Problem,
    samplers: Mapping[str, Sampler],
    spacings: Sequence[str] = ("karras",),
    nfe: Sequence[int] = (5, 10, 20, 40),
    *,
    count: int = 2048,
    progress: Progress | None = None,
) -> Comparison:
    """Run every sampler with every spacing at every number of evaluations, from the same noise.

    A sampler takes as many steps as the allowed evaluations pay for; where not even one step is
    paid for, there is no cell. What a sampler that chooses its steps asks for is counted on the
    problem itself. A sampler is anything with `init` and `step`, such as a class from a notebook's
    cell:

        found = lab.compare(lab.mixture(), {"mine": Mine(), "heun": sdjax.Heun()})
        found.save("comparison")

    Args:
        samplers: instances by the name that they are shown under.
        spacings: names in `sdjax.diffusion.spacings.NAMES`.
        nfe: evaluations of the network, each at least 1.
        count: samples in each cell.
        progress: told (done, of how many, what next).

    Raises:
        InputError: nothing to compare, or a number out of range.
    """
    if not samplers or not spacings or not nfe:
        raise InputError("a comparison needs a sampler, a spacing and a number of evaluations")
    if min(nfe) < 1 or count < 2:
        raise InputError(f"nfe must be at least 1 and count at least 2, got {min(nfe)} and {count}")
    told = progress or (lambda done, total, what: None)
    total = len(samplers) * len(spacings)
    told(0, total, "what is right")
    right = problem.reference(count)
    truth = problem.truth(count)
    chance = None if truth is None else _chance(problem, truth)
    goal = right if truth is None else truth
    cells: list[Cell] = []
    orders: dict[tuple[str, str], float] = {}
    for done, (name, spacing) in enumerate((n, s) for n in samplers for s in spacings):
        told(done, total, f"{name}, {spacing}")
        sampler = samplers[name]
        cost = meter(problem, sampler, spacing, count)
        for allowed in sorted(set(nfe)):
            steps, made = afforded(cost, allowed)
            if not steps:
                continue
            found = problem.solve(sampler, spacing, steps, count)
            error = None if may_draw(sampler) else relative_error(found, right)
            finite = np.isfinite(found).all()
            distance = sliced_wasserstein(found, goal) if finite else math.inf
            picture = problem.picture(found[:_PICTURED], right[:_PICTURED])
            shown = problem.attributes(found)
            cells.append(Cell(name, spacing, allowed, made, steps, error, distance, shown, picture))
        if not may_draw(sampler):
            order = problem.order(sampler, spacing)
            if order is not None:
                orders[name, spacing] = order
    told(total, total, "done")
    picture = problem.picture(right[:_PICTURED], right[:_PICTURED])
    return Comparison(problem.name, problem.about, count, tuple(cells), orders, chance, picture)


def _table(found: Comparison, spacing: str) -> str:
    cells = {(c.sampler, c.nfe): c for c in found.cells if c.spacing == spacing}
    nfe = sorted({n for _, n in cells})
    measured = [f for f in ("error", "distance", "attributes") if _any(cells.values(), f)]
    head = ["sampler", "order", *(f"{field}, {n}" for n in nfe for field in measured)]
    lines = [
        f"## {spacing}",
        "",
        f"| {' | '.join(head)} |",
        "|---" + "|---:" * (len(head) - 1) + "|",
    ]
    for name in found.ranked(spacing):
        order = found.orders.get((name, spacing))
        row = [f"`{name}`", "" if order is None else f"{order:.2f}"]
        for n in nfe:
            for field in measured:
                value = getattr(cells.get((name, n)), field, None)
                row.append("" if value is None else f"{value:.2g}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _any(cells: Iterable[Cell], field: str) -> bool:
    return any(getattr(cell, field) is not None for cell in cells)


def _chance(problem: Problem, truth: np.ndarray) -> float:
    others = [problem.truth(len(truth), seed) for seed in range(1, 1 + _DRAWS)]
    return float(np.mean([sliced_wasserstein(truth, o) for o in others if o is not None]))
