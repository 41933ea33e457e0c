"""The laboratory: right answers that are right, costs that are counted, pages that stand alone."""

import csv
import dataclasses
import io
import math
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sdjax
from sdjax import bundled, lab
from sdjax.cli import command
from sdjax.cli import lab as cli
from sdjax.diffusion.samplers import (
    DPMAdaptive,
    DPMSolverPP2M,
    Euler,
    EulerAncestral,
    Heun,
    HeunPP2,
    Restart,
)
from sdjax.diffusion.schedules import Schedule
from sdjax.diffusion.trajectories import evaluations
from sdjax.errors import InputError
from sdjax.lab import drawing, plots
from sdjax.lab.cost import afforded, meter
from sdjax.lab.distances import relative_error


@sdjax.pytree
class Mine:
    """A sampler from a notebook's cell."""

    def init(self, x):
        return ()

    def step(self, denoise, x, at, state, noise):
        x0 = denoise(x, at.sigma)
        return x0 + at.sigma_next / at.sigma * (x - x0), state


@pytest.fixture(scope="module")
def found() -> lab.Comparison:
    return lab.compare(
        lab.mixture(),
        {"euler": Euler(), "2m": DPMSolverPP2M(), "ancestral": EulerAncestral(), "<mine>": Mine()},
        ["karras"],
        (1, 10, 40),
        count=512,
    )


def test_more_evaluations_bring_solvers_nearer_and_higher_orders_faster(found: lab.Comparison):
    errors = {(c.sampler, c.nfe): c.error for c in found.cells}
    assert errors["euler", 10] > errors["euler", 40] > errors["2m", 40] > 0
    assert errors["ancestral", 40] is None
    assert found.orders["euler", "karras"] == pytest.approx(1, abs=0.1)
    assert found.orders["2m", "karras"] == pytest.approx(2, abs=0.15)
    assert ("ancestral", "karras") not in found.orders
    assert [c.error for c in found.cells if c.sampler == "<mine>"] == [
        c.error for c in found.cells if c.sampler == "euler"
    ]


def test_samples_of_a_good_sampler_are_as_far_from_the_data_as_the_data_from_itself(
    found: lab.Comparison,
):
    distances = {(c.sampler, c.nfe): c.distance for c in found.cells}
    assert distances["2m", 40] < 2 * found.chance < distances["euler", 1]


def test_the_reference_of_the_gaussian_is_its_closed_flow_and_heuns_many_steps_agree():
    problem = lab.gaussian()
    right = problem.reference(32)
    low, high = problem.schedule.sigma_min, problem.schedule.sigma_max
    mean, std = np.array([0.3, -0.2]), np.array([1.0, 0.25])
    noise = np.random.default_rng(0).standard_normal((32, 1, 1, 2))
    end = mean + (high * noise - mean) * np.sqrt((std**2 + low**2) / (std**2 + high**2))
    wanted = (mean * low**2 + end * std**2) / (low**2 + std**2)
    np.testing.assert_allclose(right, wanted, rtol=1e-12, atol=1e-12)
    followed = lab.Analytic("g", "", problem.denoise, lambda rng, n: right).reference(32)
    np.testing.assert_allclose(followed, right, atol=2e-6)


def test_draws_of_the_mixture_have_its_weights_and_widths():
    problem = lab.mixture()
    points = problem.truth(40_000)[:, 0, 0]
    means, stds = np.asarray(problem.denoise.means)[:, 0, 0], problem.denoise.stds
    nearest = np.linalg.norm(points[:, None] - means, axis=-1).argmin(-1)
    share = np.bincount(nearest, minlength=7) / len(points)
    np.testing.assert_allclose(share, problem.denoise.weights, atol=0.02)
    narrow = int(np.argmin(stds))
    np.testing.assert_allclose(points[nearest == narrow].std(0), stds[narrow], rtol=0.1)


def test_the_sliced_distance_of_two_gaussians_is_known():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((5_000, 1, 1, 3))
    # A shift d is seen by a direction u as u.d, whose mean square is |d|^2 / 3.
    shift = np.array([0.6, 0.0, -0.8])
    assert lab.sliced_wasserstein(a, a + shift, 2000) == pytest.approx(3**-0.5, rel=0.05)
    assert lab.sliced_wasserstein(a, 2 * a) == pytest.approx(1, rel=0.05)
    assert lab.sliced_wasserstein(a, a[::-1]) == 0
    assert relative_error(a + 0.5, a) == pytest.approx(0.5, rel=0.02)
    with pytest.raises(InputError, match="equal size"):
        lab.sliced_wasserstein(a, a[:5])


@dataclasses.dataclass(frozen=True)
class Costly:
    """Three evaluations a step, five on the last."""

    stochastic = False

    def init(self, x):
        return ()

    def step(self, denoise, x, at, state, noise):
        for _ in range(3):
            x = denoise(x, at.sigma)
        return jax.lax.cond(
            jnp.all(at.left == 1), lambda x: denoise(denoise(x, at.sigma), at.sigma), lambda x: x, x
        ), state


@pytest.mark.parametrize(
    ("sampler", "nfe", "wanted"),
    [
        (Euler(), 7, (7, 7)),
        (Heun(), 10, (5, 9)),
        (Heun(), 1, (1, 1)),
        (HeunPP2(), 8, (3, 6)),
        (Restart(), 40, (20, 39)),
        (Costly(), 4, (0, 0)),
        (Costly(), 13, (3, 11)),
    ],
)
def test_a_sampler_takes_as_many_steps_as_evaluations_pay_for(sampler, nfe, wanted):
    assert afforded(meter(lab.gaussian(), sampler, "karras", 2), nfe) == wanted


def test_a_sampler_that_chooses_its_steps_costs_what_it_asks_of_each_image():
    """Counted on the problem itself, and shown only where that is allowed."""
    problem = lab.mixture()
    loose, tight = DPMAdaptive(), DPMAdaptive(rtol=0.01, atol=0.001)
    samplers = {"loose": loose, "tight": tight}
    found = lab.compare(problem, samplers, ["karras"], (1, 10, 35, 60), count=16)
    cells = {(cell.sampler, cell.nfe): cell for cell in found.cells}
    sigmas = problem.sigmas("karras", 20)[[0, -2, -1]]
    noises = np.random.default_rng(0).standard_normal((16, 1, 1, 2)) * sigmas[0]
    for name, sampler in samplers.items():
        levels = np.tile(sigmas.reshape(3, 1, 1, 1, 1), (1, 16, 1, 1, 1))
        asked = evaluations(sampler, levels, problem.denoise, noises).mean()
        assert cells[name, 60].evaluations == math.ceil(asked)
        assert [n for n in (1, 10, 35, 60) if (name, n) in cells] == [
            n for n in (1, 10, 35, 60) if n >= asked
        ]
    assert cells["loose", 60].evaluations < cells["tight", 60].evaluations
    assert cells["loose", 60].error > cells["tight", 60].error


def test_a_class_that_is_written_anew_is_counted_anew():
    """As in a notebook, where a cell is edited: the same name, fields and steps."""

    def mine(times):
        @sdjax.pytree
        class Mine:
            def init(self, x):
                return ()

            def step(self, denoise, x, at, state, noise):
                for _ in range(times):
                    x = denoise(x, at.sigma)
                return x, state

        return Mine()

    costs = [afforded(meter(lab.gaussian(), mine(n), "karras", 2), 6) for n in (1, 2, 3)]
    assert costs == [(6, 6), (3, 6), (2, 6)]


class Page(HTMLParser):
    """Every tag is closed, nothing is fetched."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_beside_it_and_holds_every_cell(found: lab.Comparison, tmp_path):
    path = found.save(tmp_path / "made" / "here")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and all(link.startswith(("data:image/png", "#")) for link in page.links)
    assert text.count("<img") == len(found.cells) + 1
    assert "<mine>" not in text and "&lt;mine&gt;" in text
    assert not re.search(r"https?://", text)
    rows = list(csv.DictReader(io.StringIO((path.parent / "comparison.csv").read_text())))
    assert len(rows) == len(found.cells)
    assert float(rows[0]["error"]) == pytest.approx(found.cells[0].error, rel=1e-5)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no comparison can be written"):
        found.save(tmp_path / "file")


def test_tables_rank_by_error_where_most_evaluations_were_allowed(found, tmp_path):
    text = found.save(tmp_path / "table.md").read_text()
    assert text.startswith("# Samplers on mixture\n\nSeven Gaussians")
    lines = text[text.index("## karras") :].splitlines()
    errors = {c.sampler: c.error for c in found.cells if c.nfe == 40}
    names = [line.split("`")[1] for line in lines[4:]]
    assert names[-1] == "ancestral" and sorted(names[:-1], key=errors.__getitem__) == names[:-1]
    assert {line.count("|") for line in lines[2:]} == {1 + 2 + 2 * 3}


def test_plots_leave_out_what_has_no_logarithm():
    lines = [plots.Line("a", "red", [(1, 0.1), (2, float("inf")), (3, 0.0)])]
    assert plots.plot(lines, "x", "y", [1, 3]).count("<circle") == 1
    assert plots.plot([plots.Line("a", "red", [(1, 0.0)])], "x", "y", [1]) == ""


def test_a_plot_of_shares_has_room_for_none_and_for_all():
    lines = [plots.Line("a", "red", [(1, 0.0), (2, 0.7), (3, 1.0)])]
    drawn = plots.plot(lines, "x", "y", [1, 3], share=True)
    assert drawn.count("<circle") == 3 and ">0<" in drawn and ">1<" in drawn
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', drawn)]
    assert plots.HEIGHT > heights[0] > heights[1] > heights[2] > 0
    assert heights[0] - heights[1] == pytest.approx(0.7 * (heights[0] - heights[2]), abs=0.2)


def test_dots_are_drawn_where_points_are():
    inks = drawing.colours(np.array([[0.95, 0.0]]))
    picture = drawing.points(np.array([[0.95, 0.0]]), inks, side=64)
    row, column = np.unravel_index(picture.sum(-1).argmax(), (64, 64))
    assert abs(row - 32) <= 1 and abs(column - 48) <= 1
    empty = drawing.points(np.full((3, 2), np.nan), np.ones((3, 3)), side=8)
    assert (empty == empty[0, 0]).all()


def test_the_command_writes_a_page_and_refuses_before_it_works(tmp_path, capsys):
    assert set(cli.ANALYTIC) == set(lab.PROBLEMS)
    out = tmp_path / "lab"
    asked = ["lab", "compare", "--model", "gaussian", "--samplers", "euler,heun", "--nfe", "4,8"]
    assert command.main([*asked, "--count", "64", "--out", str(out), "--no-cache"]) == 0
    assert capsys.readouterr().out.strip() == str(out / "index.html")
    assert (out / "comparison.csv").read_text().count("\n") == 5
    for more, said in (
        (["--samplers", "huen"], "unknown sampler huen: try heun"),
        (["--nfe", "0"], "nfe must be a whole number from 1"),
        (["--prompts", str(tmp_path / "p")], "p"),
        (["--model", "somewhere"], "a model is compared on prompts"),
    ):
        assert command.main([*asked, *more, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err


def test_nothing_to_compare_is_refused():
    with pytest.raises(InputError, match="needs a sampler"):
        lab.compare(lab.mixture(), {})
    with pytest.raises(InputError, match="nfe must be at least 1"):
        lab.compare(lab.mixture(), {"a": Euler()}, nfe=[0])


@pytest.fixture(scope="module")
def small_scenes(tmp_path_factory):
    """A folder as the bundled one: its tokenizer, pictures of 64 pixels, no sense."""
    from test_training_job import SMALL

    from sdjax.model import FrozenConfig, Model
    from sdjax.models.clip import CLIPTextModel
    from sdjax.models.unet import UNet
    from sdjax.models.vae import AutoencoderKL
    from sdjax.training import scenes
    from sdjax.training.vocabulary import learn

    vae = SMALL["vae"] | {
        "block_out_channels": [8] * 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    modules = {
        "unet": UNet.from_config(SMALL["unet"] | {"sample_size": 8}),
        "vae": AutoencoderKL.from_config(vae),
        "text_encoder": CLIPTextModel.from_config(SMALL["text_encoder"]),
    }
    model = Model(
        **modules,
        text_encoder_2=None,
        tokenizer=learn(scenes.vocabulary(), 32),
        tokenizer_2=None,
        schedule=Schedule.from_config(SMALL["scheduler"]),
        scheduler=FrozenConfig.of(SMALL["scheduler"]),
        family="sd1",
        guidance_scale=3.0,
    )
    params = {name: tiny.random_params(module, 1) for name, module in modules.items()}
    return sdjax.save(tmp_path_factory.mktemp("scenes") / "model", model, params, dtype="float16")


def test_of_scenes_it_asks_for_captions_and_measures_what_pictures_show(small_scenes, monkeypatch):
    from sdjax.training import scenes
    from sdjax.training.feeding import HELD_OUT

    found = []

    def stopped(problem, *_, **__):
        found.append(problem)
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "HOME", small_scenes)
    monkeypatch.setattr(lab, "compare", stopped)
    run = ["lab", "compare", "--samplers", "euler", "--count", "5", "--no-cache", "--model"]
    assert command.main([*run, str(small_scenes)]) == 130
    (problem,) = found
    assert problem._guidance == 3.0 and len(set(problem._prompts)) == 5
    assert command.main([*run, "scenes"]) == 130 and found[1]._prompts == problem._prompts
    drawn = np.stack([scenes.draw(scenes.scene(HELD_OUT, n)) for n in range(5)])
    # As if the model had drawn what was asked for; then, all but once, something else.
    monkeypatch.setattr(problem, "_decoded", lambda latents: drawn)
    assert problem.attributes(np.zeros((5, 8, 8, 4))) == 1.0
    monkeypatch.setattr(problem, "_decoded", lambda latents: drawn[[0, 0, 0, 0, 0]])
    assert problem.attributes(np.zeros((5, 8, 8, 4))) == 0.2


def test_a_model_is_compared_on_its_own_pictures(tmp_path, capsys):
    tiny.save_sd1(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a house\na boat\n")
    out = tmp_path / "lab"
    asked = ["lab", "compare", "--model", str(tmp_path / "model"), "--samplers", "euler"]
    asked += ["--prompts", str(tmp_path / "prompts.txt"), "--nfe", "1,2", "--count", "3"]
    assert command.main([*asked, "--guidance", "2", "--out", str(out), "--no-cache"]) == 0
    rows = list(csv.DictReader(io.StringIO((out / "comparison.csv").read_text())))
    assert [(r["evaluations"], r["steps"]) for r in rows] == [("1", "1"), ("2", "2")]
    assert float(rows[0]["error"]) > float(rows[1]["error"]) > 0
    assert rows[0]["order"] == rows[0]["attributes"] == ""
    model, params = sdjax.load(tmp_path / "model")
    problem = lab.Pictures(model, params, ["a house", "a boat"], guidance_scale=2.0)
    latents = problem.solve(Euler(), "karras", 2, 8)
    settings = {"seeds": range(8), "steps": 2, "sampler": Euler(), "spacing": "karras"}
    # What is shown is what text_to_image makes.
    images = sdjax.text_to_image(
        model, params, ["a house", "a boat"] * 4, guidance_scale=2.0, **settings
    )
    shown = problem._decoded(latents)
    assert np.abs(shown.astype(int) - images.astype(int)).max() <= 1
    with pytest.raises(InputError, match="needs prompts"):
        lab.Pictures(model, params, [])
