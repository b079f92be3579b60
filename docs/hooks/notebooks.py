"""Notebooks as pages of the site: executed while it is built, so that what a page shows is what this version does."""

import os
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Of a processor, since a machine that does other things too takes longer: what pages promise is three minutes on two cores.
MOST_SECONDS = 180


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
            before = _seconds()
            ExecutePreprocessor(timeout=600, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(work)}})
            if (seconds := _seconds() - before) > MOST_SECONDS:
                raise RuntimeError(f"{path.name} takes {seconds:.0f} seconds of a processor, more than {MOST_SECONDS}")
            print(f"{path.name}: {seconds:.0f} s of a processor", flush=True)
            prefix = f"{path.stem}-"
            body, resources = MarkdownExporter().from_notebook_node(notebook)
            for name, content in resources["outputs"].items():
                body = body.replace(f"]({name})", f"]({prefix}{name})")
                files.append(File.generated(config, f"notebooks/{prefix}{name}", content=content))
            files.append(File.generated(config, f"notebooks/{path.stem}.md", content=_links(body)))
    return files


def _seconds() -> float:
    """Processor time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _links(body: str) -> str:
    """The page's links from where it stands on the site."""
    body = re.sub(r"\]\(\.\./docs/([^)]+)\)", r"](../\1)", body)
    return re.sub(r"\]\((\d\d-[\w-]+)\.ipynb\)", r"](\1.md)", body)
