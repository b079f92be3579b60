"""What is installed: every sub-package, the assets, the dependencies; what is imported: nothing before it is needed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    """A sub-package that is not listed is missing from the wheel without a word."""
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    where = PROJECT["tool"]["setuptools"]["package-dir"]
    found = set()
    for package, folder in where.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            relative = init.parent.relative_to(ROOT / folder)
            found.add(".".join([package, *relative.parts]))
    assert listed == found


def test_every_file_of_data_is_listed():
    """Built-in recipes and templates of pages, too, are missing from the wheel without a word."""
    settings = PROJECT["tool"]["setuptools"]
    folders = {**{p: p.replace(".", "/") for p in settings["packages"]}, **settings["package-dir"]}
    shipped = {
        path for name, globs in settings["package-data"].items() for glob in globs for path in (ROOT / folders[name]).glob(glob)
    }
    found = {path for top in settings["package-dir"].values() for path in (ROOT / top).rglob("*") if path.is_file()}
    assert {path for path in found if path.suffix not in (".py", ".pyc")} == {path for path in shipped if path.is_file()}


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("smolvlm_jax", "convert", "train")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 450
    }
    assert not long, "each file has one idea"


def test_dependencies_are_the_projects_own():
    names = {d.split(";")[0].split(">")[0].strip() for d in PROJECT["project"]["dependencies"]}
    assert names == {
        "jax", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "safetensors", "tokenizers", "jinja2", "tqdm",
        "decord", "av",
    }  # fmt: skip
    assert {"train", "hub", "parquet", "ray", "test"} <= set(PROJECT["project"]["optional-dependencies"])
    assert not any("<" in d.replace("<=", "<") for d in PROJECT["project"]["dependencies"]), "no upper pins"


def test_pyav_is_installed_everywhere_and_decord_where_it_has_wheels():
    from packaging.requirements import Requirement

    required = {r.name: r.marker for r in map(Requirement, PROJECT["project"]["dependencies"])}
    for platform, machine, want in [
        ("linux", "x86_64", ["av", "decord"]),
        ("linux", "aarch64", ["av"]),
        ("darwin", "arm64", ["av"]),
        ("darwin", "x86_64", ["av"]),
        ("win32", "AMD64", ["av", "decord"]),
    ]:
        environment = {"sys_platform": platform, "platform_machine": machine}
        found = [name for name in ("av", "decord") if not (marker := required[name]) or marker.evaluate(environment)]
        assert found == want


HEAVY = ("jax", "flax", "optax", "orbax", "torch", "transformers", "numpy", "PIL", "tokenizers", "decord", "av", "jinja2")
NEVER = ("torch", "transformers", "torchvision", "num2words", "flash_attn")


def _imported(code: str, *names: str) -> list[str]:
    script = f"import sys\n{code}\nprint(*[n for n in {names!r} if n in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return out.stdout.split("\n")[-2].split()


def test_importing_the_package_imports_nothing_heavy():
    assert _imported("import smolvlm_jax; dir(smolvlm_jax)", *HEAVY) == []


def test_the_command_line_starts_without_anything_heavy():
    assert _imported("from smolvlm_jax.cli import _parser; _parser()", *HEAVY) == []


def test_preprocessing_imports_no_jax():
    assert _imported("from smolvlm_jax import SmolVLMProcessor", "jax", "flax", "decord", "av", *NEVER) == []


def test_running_the_model_imports_no_reference():
    code = "import smolvlm_jax\nfor name in smolvlm_jax.__all__: getattr(smolvlm_jax, name)\nimport smolvlm_jax.train.loop"
    assert _imported(code, *NEVER) == []


def test_every_exported_name_exists():
    import smolvlm_jax

    assert all(getattr(smolvlm_jax, name) is not None for name in smolvlm_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = smolvlm_jax.nothing


def test_assets_are_small_and_whole():
    assets = ROOT / "smolvlm_jax" / "assets" / "tiny"
    files = {p.name: p.stat().st_size for p in assets.iterdir()}
    assert sum(files.values()) <= 12e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "processor_config.json"} <= set(
        files
    )
    assert sum(p.stat().st_size for p in (ROOT / "tests" / "data").rglob("*") if p.is_file()) <= 6e6


def test_no_code_of_ours_unpickles():
    for folder in ("smolvlm_jax", "convert", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert "pickle.load" not in text and "eval(" not in text.replace(".eval(", ""), path
