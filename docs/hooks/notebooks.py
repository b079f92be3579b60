"""Notebooks as pages of the site: executed while it is built, so that what a page shows is what this version does."""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def on_files(files, *, config):
    """Add a page for each notebook, and the pictures that it draws. A cell that fails ends the build."""
    import nbformat
    from mkdocs.structure.files import File
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cells call smolvlm-jax
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "notebooks"
        work.mkdir()
        shutil.copytree(ROOT / "examples", Path(folder) / "examples")
        for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
            notebook = nbformat.read(path, as_version=4)
            ExecutePreprocessor(timeout=600, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(work)}})
            prefix = f"{path.stem}-"
            body, resources = MarkdownExporter().from_notebook_node(notebook)
            for name, content in resources["outputs"].items():
                body = body.replace(f"]({name})", f"]({prefix}{name})")
                files.append(File.generated(config, f"notebooks/{prefix}{name}", content=content))
            files.append(File.generated(config, f"notebooks/{path.stem}.md", content=_links(body)))
    return files


def _links(body: str) -> str:
    """The page's links from where it stands on the site."""
    body = re.sub(r"\]\(\.\./docs/([^)]+)\)", r"](../\1)", body)
    return re.sub(r"\]\((\d\d-[\w-]+)\.ipynb\)", r"](\1.md)", body)
