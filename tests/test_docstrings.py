"""Every public name says what it takes, gives and raises: `Args:`, `Returns:` (or `Yields:`) and `Raises:` in its docstring.

Public are the names that packages export, those on the API pages and those that documents and notebooks import, with methods.
Files are parsed, not imported. An error counts as raised where the function itself, or a function of its file that it calls,
raises a class of errors.py.
"""

import ast
import functools
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXPORTING = ("", ".engine", ".batch", ".train", ".plan", ".documents", ".processing", ".storage")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _file(module: str) -> Path:
    """Where a module of the package stands in the repository."""
    parts = module.split(".")[1:]
    top = ROOT if parts[:1] in (["convert"], ["train"]) else ROOT / "smolvlm_jax"
    path = top.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_file(module).read_text(encoding="utf-8"))


@functools.cache
def _is_module(module: str) -> bool:
    return _file(module).exists()


@functools.cache
def _imports(module: str) -> dict[str, tuple[str, str]]:
    """Name in this module -> module and name where it comes from, lazy exports included."""
    package = module if _file(module).name == "__init__.py" else module.rpartition(".")[0]
    found = {}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            source = f"{base}.{node.module}" if node.module else base
            found.update({alias.asname or alias.name: (source, alias.name) for alias in node.names})
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazy_exports":
            homes = ast.literal_eval(node.args[1])
            found.update({name: (f"smolvlm_jax.{home}", name) for home, names in homes.items() for name in names})
    return found


@functools.cache
def _definition(module: str, name: str) -> tuple[str, ast.AST] | None:
    """The module and the function or class that a name stands for; None for constants and names of other packages."""
    if not module.startswith("smolvlm_jax") or not _is_module(module):
        return None
    for node in _tree(module).body:
        if isinstance(node, _Function | ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == [name]:
            return _definition(module, node.value.id) if isinstance(node.value, ast.Name) else None
    source = _imports(module).get(name)
    return _definition(*source) if source and source != (module, name) else None


def _public() -> set[tuple[str, str]]:
    """Module and name of everything that users are shown."""
    found = set()
    for suffix in EXPORTING:
        module = f"smolvlm_jax{suffix}"
        found |= {(module, name) for name in _imports(module) if not name.startswith("_")}
    found |= {
        ("smolvlm_jax.errors", n.name) for n in _tree("smolvlm_jax.errors").body if isinstance(n, _Function | ast.ClassDef)
    }
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for module, members in re.findall(r"^::: (\S+)\n +options: \{members: \[(.*?)\]\}", page.read_text(), re.M):
            found |= {(module, name.strip()) for name in members.split(",")}
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        texts += ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    for module, names in re.findall(r"^ *from (smolvlm_jax[\w.]*) import ([\w, ]+)", "\n".join(texts), re.M):
        found |= {(module, name.strip()) for name in names.split(",")}
    return {(module, name) for module, name in found if not _is_module(f"{module}.{name}")}


def _family(module: str, cls: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and its bases in the package, each with its module, the nearest first."""
    yield module, cls
    for base in cls.bases:
        found = _definition(module, base.id) if isinstance(base, ast.Name) else None
        if found and isinstance(found[1], ast.ClassDef):
            yield from _family(found[0], found[1])


def _methods(module: str, cls: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef, _Function]]:
    """Methods of a class and of its bases in the package, the nearest of each name."""
    seen: set[str] = set()
    for home, node in _family(module, cls):
        for method in node.body:
            if isinstance(method, _Function) and method.name not in seen:
                seen.add(method.name)
                yield home, node, method


def _sections(text: str | None) -> dict[str, str]:
    """Heading -> text of the sections of a Google docstring."""
    parts = re.split(r"^ *(Args|Attributes|Returns|Yields|Raises):[ ]*\n", inspect.cleandoc(text or "") + "\n", flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _named(section: str) -> set[str]:
    """What the entries of a section are called: `a, b: text` names two."""
    depth = min((len(line) - len(line.lstrip()) for line in section.splitlines() if line.strip()), default=0)
    entries = re.findall(rf"^ {{{depth}}}(\S[^:\n]*?):(?:\s|$)", section, re.M)
    return {name.strip(" *`") for entry in entries for name in re.sub(r"\(.*?\)", "", entry).split(",")}


def _decorators(function: _Function | ast.ClassDef) -> set[str]:
    names = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {n.attr if isinstance(n, ast.Attribute) else n.id for n in names if isinstance(n, ast.Attribute | ast.Name)}


def _arguments(module: str, function: _Function) -> tuple[set[str], str | None]:
    """The arguments of a function without the one for the rest of the keywords, and the name of that one."""
    for decorator in function.decorator_list:  # generation.py: the signature of another function
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "_takes_prompts":
            found = _definition(module, ast.unparse(decorator.args[0]))
            assert found is not None and isinstance(found[1], _Function)
            function = found[1]
    a = function.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg,)))]
    return {n for n in names if n not in ("self", "cls") and not n.startswith("_")}, a.kwarg.arg if a.kwarg else None


@functools.cache
def _errors() -> dict[str, set[str]]:
    """Class of errors.py -> its own name and those of its bases there."""
    found: dict[str, set[str]] = {}
    for node in _tree("smolvlm_jax.errors").body:
        if isinstance(node, ast.ClassDef):
            bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
            found[node.name] = {node.name}.union(*(found.get(base, set()) for base in bases))
    return found


def _raised(module: str, cls: ast.ClassDef | None, function: _Function, seen: set[str]) -> set[str]:
    """Our errors that a function raises by name, itself or through functions and methods of the same file."""
    local = {node.name: (None, node) for node in _tree(module).body if isinstance(node, _Function)}
    own = {node.name: (cls, node) for node in (cls.body if cls else ()) if isinstance(node, _Function)}
    seen.add(function.name)
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found |= {node.exc.func.id} & set(_errors())
        target = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            target = local.get(node.func.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            target = own.get(node.func.attr) if node.func.value.id in ("self", "cls") else None
        if target and target[1].name not in seen:
            found |= _raised(module, *target, seen)
    return found


def _lacks(module: str, cls: ast.ClassDef | None, function: _Function, sections: dict[str, str]) -> Iterator[str]:
    given = _named(sections.get("Args", ""))
    wanted, rest = _arguments(module, function)
    if missing := wanted - given:
        yield f"Args: {', '.join(sorted(missing))}"
    surplus = given - wanted - {rest}
    if rest and not rest.startswith("_") and rest not in given and not surplus:
        yield f"Args: {rest}"
    if surplus and not rest:  # keywords may be described one by one
        yield f"no such argument: {', '.join(sorted(surplus))}"
    returned = ast.unparse(function.returns) if function.returns else "None"
    gives = returned not in ("None", "NoReturn", "Never") or any(
        isinstance(n, ast.Return) and n.value is not None for n in ast.walk(function) if function.returns is None
    )
    if gives and function.name != "__init__" and not {"Returns", "Yields"} & set(sections):
        yield "Returns"
    for error in sorted(_raised(module, cls, function, set())):
        if not _errors()[error] & _named(sections.get("Raises", "")):
            yield f"Raises: {error}"


def _fields(cls: ast.ClassDef) -> set[str]:
    """Fields of a dataclass, a named tuple or a Flax module that its constructor takes."""
    return {
        node.target.id
        for node in cls.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
        and "ClassVar" not in ast.unparse(node.annotation)
        and "init=False" not in ast.unparse(node)
        # an option that describes itself: `name: type = _option("…")`
        and not (isinstance(node.value, ast.Call) and node.value.args and isinstance(node.value.args[0], ast.Constant))
    }


def _offences(module: str, name: str) -> Iterator[str]:
    found = _definition(module, name)
    if found is None:
        return
    home, node = found
    place = f"{home}.{node.name}"
    text = ast.get_docstring(node)
    if not text:
        yield f"{place}: no docstring"
    elif isinstance(node, _Function):
        yield from (f"{place}: {what}" for what in _lacks(home, None, node, _sections(text)))
    if not isinstance(node, ast.ClassDef):
        return
    sections = _sections(text)
    family = [cls for _, cls in _family(home, node)]
    described = {
        n for cls in family for key in ("Args", "Attributes") for n in _named(_sections(ast.get_docstring(cls)).get(key, ""))
    }
    if missing := {field for cls in family for field in _fields(cls)} - described:
        yield f"{place}: Attributes: {', '.join(sorted(missing))}"
    for where, cls, method in _methods(home, node):
        label = f"{where}.{cls.name}.{method.name}"
        own = ast.get_docstring(method)
        if method.name == "__init__":
            both = {key: sections.get(key, "") + _sections(own).get(key, "") for key in ("Args", "Raises")}
            yield from (f"{label}: {what}" for what in _lacks(where, cls, method, both))
        elif (method.name.startswith("_") and method.name != "__call__") or method.name == "setup":
            continue
        elif not own:
            yield f"{label}: no docstring"
        elif not _decorators(method) & {"property", "cached_property", "overload"}:
            yield from (f"{label}: {what}" for what in _lacks(where, cls, method, _sections(own)))


def test_public_names_say_what_they_take_give_and_raise():
    names = _public()
    assert len(names) > 100 and ("smolvlm_jax", "load") in names and ("smolvlm_jax.convert.verify", "verify") in names
    offenders = sorted({offence for module, name in names for offence in _offences(module, name)})
    assert not offenders, "\n".join(offenders)


_EXAMPLE = """
def f(a, *, b: int = 0) -> int:
    '''Does.

    Args:
        a: a number (int).
        c: gone.
    '''
    return _g(a)

def _g(a):
    raise ConfigError("no")
"""


def test_what_a_docstring_lacks_is_found(monkeypatch):
    tree = ast.parse(_EXAMPLE)
    monkeypatch.setitem(globals(), "_tree", lambda name, original=_tree: tree if name == "example" else original(name))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    found = list(_lacks("example", None, function, _sections(ast.get_docstring(function))))
    assert found == ["Args: b", "no such argument: c", "Returns", "Raises: ConfigError"]
