"""What the site adds to the pages as they stand in the repository: links to files outside docs/, and generated pages."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOB = "/blob/main/"


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    """Links to files of the repository that are no pages lead to the repository."""
    blob = config["repo_url"].rstrip("/") + _BLOB
    depth = page.file.src_uri.count("/") + 1
    outside = r"\]\(" + r"\.\./" * depth + r"([^)]+)\)"
    out = re.sub(outside, lambda found: f"]({_home(found[1], blob)})", markdown)
    if page.file.src_uri == "recipe-keys.md":
        out += _recipe_keys()
    if page.file.src_uri == "changelog.md":
        text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
        out = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
        out = re.sub(r"\]\((?!http|[\w-]+\.md)([^)]+)\)", lambda found: f"]({blob}{found[1]})", out)
    return out


def _home(target: str, blob: str) -> str:
    if target.startswith("notebooks/"):  # pages, made by notebooks.py
        return target.replace(".ipynb", ".md")
    return "index.md" if target == "README.md" else blob + target


def _recipe_keys() -> str:
    from smolvlm_jax.train.listing import recipe_keys

    rows = [f"| `{key}` | `{default}` | {text.replace('|', chr(92) + '|')} |" for key, default, text in recipe_keys()]
    return "\n".join(["", "| key | default | meaning |", "|---|---|---|", *rows, ""])
