"""The commands that the pages show, as words, and whether a shell and our command line could read each of them."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

from smolvlm_jax.cli import _parser
from smolvlm_jax.errors import SmolVLMError
from smolvlm_jax.train.recipes import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
_EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
# Programs that are no part of this project, with the words that may follow them; of the others form is checked further.
_FOREIGN = {
    "gcloud": ("services", "compute", "container", "artifacts", "storage"),
    "kubectl": ("apply", "get", "logs", "create"),
    "docker": ("build", "push"),
    "git": ("clone",),
}
_SHELL = {"cd", ".", "python3", "export", "sleep", "srun", "pre-commit", "pytest", ".ci/check", "lint-imports", "mypy", "true"}
_KEYWORDS = ("for", "do", "done", "until", "while", "break")


def commands(path: Path) -> Iterator[str]:
    """The lines of a page that are commands: indented ones, those behind `$ `, and those of srun in a sentence."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    fenced = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
    for block in fenced.finditer(text):
        if block[2] in ("", "console"):
            yield from re.findall(r"^ *\$ (.*)$", block[3], re.M)
    plain = fenced.sub("", text)
    for line in re.findall(r"^(?: {4}| {6})(\S.*)$", plain, re.M):
        word = re.split(r"[ (\[]", line)[0]
        if word in ("smolvlm-jax", "pip", "python", *_FOREIGN, *_SHELL, "for", "until") or re.match(r"[A-Z_]+=", word):
            yield line
    yield from re.findall(r"`(srun [^`]+)`", plain)


def problems(line: str) -> Iterator[str]:
    """What is wrong with a command line of a page."""
    for words in _simple(line):
        while words and (words[0] in _KEYWORDS or re.fullmatch(r"[A-Z_]+=.*", words[0])):
            words = words[1:]
        words = words[1:] if words[:1] == ["export"] else words
        if not words or words[0] in ("[", "I") or re.fullmatch(r"[A-Z_]+=.*", words[0]):
            continue
        yield from _program(words)


def _simple(line: str) -> Iterator[list[str]]:
    """The simple commands of a line of shell, without what is redirected and without remarks."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    words: list[str] = []
    for word in lexer:
        if set(word) <= set(";&|"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def _program(words: list[str]) -> Iterator[str]:
    name, *rest = words
    if name.endswith("bin/smolvlm-jax") or name == "smolvlm-jax":
        yield from _ours(rest)
    elif name == "pip":
        yield from _pip(rest)
    elif name == "python":
        yield from _python(rest)
    elif name == "srun":
        yield from _program(rest[rest.index("smolvlm-jax") :])
    elif name in _FOREIGN:
        if rest[0] not in _FOREIGN[name]:
            yield f"{name} {rest[0]}"
        for named in (word for word in rest if word.startswith("examples/")):
            if not (ROOT / named).exists():
                yield f"{named} does not exist"
        for word in rest:
            if word.startswith("--command="):
                yield from problems(word.partition("=")[2])
    elif name not in _SHELL:
        yield f"{name} is no command that pages may show"


def _ours(words: list[str]) -> Iterator[str]:
    words = ["0" if word in ("I", "$I") else word for word in words if word != "…"]
    if words[:1] == ["train"] and (len(words) < 2 or words[1] == "RECIPE"):
        return
    words = [word for word in words if word != "[key=value …]"]
    try:
        options = _parser().parse_args(words)
        if options.command == "batch" and options.prompt is None and not re.search(r"\.(jsonl|parquet)$", options.input):
            yield f"has no --prompt, and {options.input} may hold pictures"
        if options.command == "train" and getattr(options, "recipe", None):
            load_recipe(options.recipe, [word for word in words[2:] if "=" in word and not word.startswith("-")])
    except SystemExit as error:
        if error.code:  # else it has shown what was asked for
            yield f"is refused: {error}"
    except SmolVLMError as error:
        yield f"is refused: {error}"


def _pip(words: list[str]) -> Iterator[str]:
    if words[0] != "install":
        yield f"pip {words[0]}"
    for word in words[1:]:
        extras = re.match(r"(?:\.|/?smolvlm-jax)\[([\w,-]+)\]", word)
        for extra in extras[1].split(",") if extras else ():
            if extra not in _EXTRAS:
                yield f"there is no extra {extra}"


def _python(words: list[str]) -> Iterator[str]:
    if words[0] == "-m":
        return
    if not (ROOT / words[0]).exists():
        yield f"{words[0]} does not exist"
        return
    text = (ROOT / words[0]).read_text()
    for option in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
        if f'"{option}"' not in text:
            yield f"{words[0]} has no {option}"
