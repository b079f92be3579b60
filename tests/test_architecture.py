"""The shape of the package: no import cycles, no jax where none is needed, names that stand once.

The layers themselves are contracts of import-linter in pyproject.toml, which `.ci/check` runs.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("smolvlm_jax", "convert", "train")
# Modules and packages that prepare data, settings and files: they run in processes that never load jax.
WITHOUT_JAX = (
    "arguments", "child", "config", "directories", "engine.requests", "errors", "generation_config", "io", "locate",
    "processing", "records", "sizes",
)  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory that holds the package as it is installed: convert/ and train/ inside smolvlm_jax/."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "assets")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, tree / "smolvlm_jax" / folder.replace("smolvlm_jax", ""), ignore=ignore, dirs_exist_ok=True
        )
    return tree


@pytest.fixture(scope="module")
def graph(installed):
    """Which module imports which, lazy imports included."""
    grimp = pytest.importorskip("grimp", reason="reads the imports with grimp: pip install 'smolvlm-jax[dev]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(installed)
        return grimp.build_graph("smolvlm_jax", cache_dir=None)


def test_no_module_imports_itself_through_others(graph):
    cycles = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            back = graph.find_shortest_chain(importer=imported, imported=importer)
            cycles |= {" <-> ".join(sorted(back))} if back else set()
    assert not cycles


def test_inside_the_package_names_are_imported_from_where_they_are_defined(graph):
    """An import from the package itself would hide from the contracts which module is meant."""
    for importer in graph.find_modules_that_directly_import("smolvlm_jax"):
        for detail in graph.get_import_details(importer=importer, imported="smolvlm_jax"):
            assert detail["line_contents"].endswith(". import __version__"), importer


def test_the_layers_are_described_as_they_are_checked():
    """The list of CONTRIBUTING.md is that of pyproject.toml."""
    described = re.search(r"\n## Layers\n.*?\n\n((?:    [^\n]+\n)+)", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert described is not None and described.group(1).split("\n") == [*(f"    {layer}" for layer in layers), ""]


def test_the_file_map_is_in_the_order_of_imports(graph):
    """docs/architecture.md: each line uses only lines above it."""
    block = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("## Files")[1].split("\n## ")[0]
    place = {name: number for number, name in enumerate(re.findall(r"^ {6}(\w+)(?:\.py|/)", block, re.MULTILINE))}
    part = lambda module: place.get(module.split(".")[1]) if "." in module else None
    wrong = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            user, used = part(importer), part(imported)
            if user is not None and used is not None and used > user:
                wrong.add(f"{importer} imports {imported}")
    assert not wrong


def test_what_prepares_data_imports_no_jax(installed):
    """In a fresh interpreter, every module of it."""
    names = []
    for name in WITHOUT_JAX:
        path = installed / "smolvlm_jax" / name.replace(".", "/")
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        names += [".".join(file.relative_to(installed).with_suffix("").parts).removesuffix(".__init__") for file in files]
    code = "import importlib, sys\n"
    code += f"for name in {names}:\n    importlib.import_module(name)\n    assert 'jax' not in sys.modules, name\n"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("name", ["Source", "open_source", "Made", "RULES"])
def test_names_stand_once(installed, name):
    """Two things of one name cannot be told apart in a traceback or a search."""
    pattern = re.compile(rf"^(?:class |def )?{name}\b *[(:=]", re.MULTILINE)
    found = [str(path.relative_to(installed)) for path in installed.rglob("*.py") if pattern.search(path.read_text("utf-8"))]
    assert len(found) <= 1
