"""A comparison as one HTML page that needs nothing beside it."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdjax.lab.compare import Cell, Comparison
from sdjax.lab.plots import Line, colour, plot


def page(found: Comparison) -> str:
    """Plots by spacing, a table, and every cell's picture from the same noise."""
    samplers = list(dict.fromkeys(cell.sampler for cell in found.cells))
    spacings = list(dict.fromkeys(cell.spacing for cell in found.cells))
    inks = {name: colour(n, len(samplers)) for n, name in enumerate(samplers)}
    sections = [_section(found, spacing, samplers, inks) for spacing in spacings]
    names = "".join(
        f'<button data-name="{html.escape(n)}" style="--ink: {inks[n]}">{html.escape(n)}</button>'
        for n in samplers
    )
    tabs = "".join(
        f'<a href="#{html.escape(s)}">{html.escape(s)}</a>' for s in spacings if len(spacings) > 1
    )
    title = f"Samplers on {html.escape(found.problem)}"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_beside("page.css")}</style>
<header>
<figure class="right">{_image(found.right)}<figcaption>right</figcaption></figure>
<div><h1>{title}</h1>
<p>{html.escape(found.about)}</p>
<p>{found.samples:,} samples in every cell, all cells from the same noise. Evaluations are those of
the network; a sampler takes as many steps as they pay for. <b>Error</b> is the distance from what
is right for the same noise, <b>distance</b> the sliced Wasserstein distance between sets of
samples.</p>
</div></header>
<nav>{names}<span class="tabs">{tabs}</span></nav>
<main>{"".join(sections)}</main>
<script>{_beside("page.js")}</script>
</html>
"""


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _section(found: Comparison, spacing: str, samplers: Sequence[str], inks: dict[str, str]) -> str:
    cells = [cell for cell in found.cells if cell.spacing == spacing]

    def lines(field: str) -> list[Line]:
        return [
            Line(
                name,
                inks[name],
                [
                    (cell.evaluations, value)
                    for cell in cells
                    if cell.sampler == name and (value := getattr(cell, field)) is not None
                ],
            )
            for name in samplers
        ]

    chance = {} if found.chance is None else {"two sets of draws": found.chance}
    nfe = sorted({cell.nfe for cell in cells})
    plots = [
        plot(lines("error"), "evaluations", "error", nfe),
        plot(lines("distance"), "evaluations", "distance", nfe, chance),
    ]
    if any(cell.attributes is not None for cell in cells):
        plots.append(plot(lines("attributes"), "evaluations", "share as asked", nfe, share=True))
    name = html.escape(spacing)
    return (
        f'<section id="{name}"><h2>{name}</h2><div class="plots">{"".join(plots)}</div>'
        f"{_table(found, spacing, cells, inks)}{_grid(cells, samplers, inks)}</section>"
    )


def _table(
    found: Comparison,
    spacing: str,
    cells: Sequence[Cell],
    inks: dict[str, str],
) -> str:
    """Samplers ranked by their error, or distance, where most evaluations were allowed."""
    nfe = sorted({cell.nfe for cell in cells})
    by = {(cell.sampler, cell.nfe): cell for cell in cells}
    measured = any(cell.attributes is not None for cell in cells)
    ordered = any(where == spacing for _, where in found.orders)

    best = {
        (field, n): min(
            (v for c in cells if c.nfe == n and (v := getattr(c, field)) is not None), default=None
        )
        for field in ("error", "distance")
        for n in nfe
    }
    head = "<th>sampler</th>" + ("<th>order</th>" if ordered else "")
    head += "".join(f'<th colspan="{2 + measured}">{n} evaluations</th>' for n in nfe)
    under = "<th></th>" * (1 + ordered)
    under += ("<th>error</th><th>distance</th>" + "<th>as asked</th>" * measured) * len(nfe)
    rows = []
    for name in found.ranked(spacing):
        row = f'<th class="name" style="--ink: {inks[name]}">{html.escape(name)}</th>'
        if ordered:
            order = found.orders.get((name, spacing))
            row += f"<td>{'' if order is None else f'{order:.2f}'}</td>"
        for n in nfe:
            cell = by.get((name, n))
            for field in ("error", "distance"):
                value = None if cell is None else getattr(cell, field)
                mark = ' class="best"' if value is not None and value == best[field, n] else ""
                row += f"<td{mark}>{'–' if value is None else f'{value:.2g}'}</td>"
            if measured:
                value = None if cell is None else cell.attributes
                row += f"<td>{'–' if value is None else f'{100 * value:.0f} %'}</td>"
        rows.append(f'<tr data-name="{html.escape(name)}">{row}</tr>')
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr><tr class="under">{under}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _grid(cells: Sequence[Cell], samplers: Sequence[str], inks: dict[str, str]) -> str:
    """A row a sampler, a column a number of evaluations."""
    nfe = sorted({cell.nfe for cell in cells})
    by = {(cell.sampler, cell.nfe): cell for cell in cells}
    rows = []
    for name in samplers:
        figures = []
        for n in nfe:
            cell = by.get((name, n))
            if cell is None:
                figures.append('<figure class="none"></figure>')
                continue
            said = f"{cell.evaluations} evaluations, {cell.steps} steps"
            figures.append(
                f"<figure>{_image(cell.picture)}<figcaption>{said}</figcaption></figure>"
            )
        label = f'<h3 style="--ink: {inks[name]}">{html.escape(name)}</h3>'
        rows.append(
            f'<div class="row" data-name="{html.escape(name)}">{label}{"".join(figures)}</div>'
        )
    return f'<div class="grid">{"".join(rows)}</div>'


def _image(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    height, width = pixels.shape[:2]
    size = f'width="{width}" height="{height}"'
    return f'<img alt="" loading="lazy" {size} src="data:image/png;base64,{data}">'
