"""What a user installs: the wheel's contents, the command, and bounds that mean something."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {
        re.match(r"[A-Za-z0-9_.-]+", r)[0].lower().replace("-", "_").replace(".", "_")
        for r in requirements
    }


def test_every_dependency_has_a_lower_bound():
    extras = PROJECT["optional-dependencies"].values()
    for requirement in [*PROJECT["dependencies"], *(r for extra in extras for r in extra)]:
        assert ">=" in requirement or requirement.startswith("sdjax["), requirement


def test_every_import_is_declared_and_every_dependency_imported():
    declared = names(PROJECT["dependencies"])
    optional = names([r for extra in PROJECT["optional-dependencies"].values() for r in extra])
    imported = set()
    for file in (ROOT / "sdjax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    packages = {"PIL": "pillow", "absl": "absl_py", "orbax": "orbax_checkpoint"}
    imported = {packages.get(name, name).lower() for name in imported}
    imported -= set(sys.stdlib_module_names) | {"sdjax"}
    assert imported <= declared | optional, f"not declared: {imported - declared - optional}"
    assert declared <= imported, f"declared and never imported: {declared - imported}"


def test_the_wheel_ships_configs_and_vocabulary(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    import zipfile

    held = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"sdjax/configs/{file.name}" for file in (ROOT / "configs").glob("*.toml")}
    assets = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "sdjax" / "assets").rglob("*")
        if file.is_file()
    }
    assert configs and configs | assets <= held
    assert not any(name.startswith(("tests/", "notebooks/")) for name in held)


def test_every_shipped_config_is_valid_toml():
    for file in (ROOT / "configs").glob("*.toml"):
        tomllib.loads(file.read_text(encoding="utf-8"))


def test_the_readmes_sampler_is_heuns_method():
    import jax
    import numpy as np

    import sdjax
    from sdjax.diffusion.analytic import Gaussian

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import jax.numpy.*?)\nimages = ", readme, re.DOTALL)
    scope: dict = {"__name__": "readme"}
    exec(block, scope)
    x = 10 * jax.random.normal(jax.random.key(0), (1, 4, 4, 3))
    sigmas = np.append(np.geomspace(10, 0.1, 8), 0.0)
    mine, heun = (
        sdjax.sample(sampler, Gaussian(0.3, 0.5), x, sigmas)
        for sampler in (scope["MyHeun"](), sdjax.Heun())
    )
    np.testing.assert_allclose(mine, heun, atol=2e-5)


def test_the_readme_names_every_file_it_links():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"README links {target}, which is not there"
