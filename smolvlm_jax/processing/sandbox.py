"""Chat templates as programs: jinja2's immutable sandbox, and which templates are harmless.

A template comes with a checkpoint and is not trusted. The sandbox keeps it from the interpreter, not from memory and time: a
text that is doubled in a loop fills any memory. `harmless` recognises templates whose work is proportional to what they
render, as all published ones are; the others run in a child process with limits (rendering.py).
"""

import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ..errors import PromptError

__all__ = [
    "GENERATION_VARIABLES",
    "InvalidError",
    "compile_template",
    "harmless",
    "literals",
    "run",
    "variables_of",
    "weight",
    "written",
]

_LONGEST = 200_000  # characters of a template; to parse so many takes up to two seconds
_SHORT = 4_000  # of a harmless one
_MAX_PRODUCT = 10**7
# What is written around a generation block, if the template is given it; see generations.py.
GENERATION_VARIABLES = ("generation_start_", "generation_end_")
# What a loop of a harmless template may use beside the value of its own turn.
_SMALL_NAMES = frozenset({"loop", "bos_token", "eos_token", "pad_token", "unk_token", *GENERATION_VARIABLES})
_LOOP_ATTRIBUTES = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length", "depth", "depth0"})
_FILTERS = frozenset({"capitalize", "lower", "upper", "title", "trim", "length", "count", "string", "safe", "tojson"})
_METHODS = frozenset({"capitalize", "lower", "upper", "title", "strip", "lstrip", "rstrip"})
_TESTS = frozenset({"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number", "true", "false"})


class InvalidError(PromptError):
    """A template that is no program, whatever it is given."""


@functools.lru_cache
def _environment() -> Any:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox, which also refuses a template that multiplies its way to a billion characters."""

        intercepted_binops = frozenset(["*", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "**":
                raise jinja2.exceptions.SecurityError("a chat template cannot raise to a power")
            length = max((len(v) for v in (left, right) if hasattr(v, "__len__")), default=1)
            count = max((v for v in (left, right) if isinstance(v, int)), default=1)
            if length * count > _MAX_PRODUCT:
                raise jinja2.exceptions.SecurityError("a chat template made too long a product")
            return super().call_binop(context, operator, left, right)

    class Generation(jinja2.ext.Extension):
        """{% generation %} … {% endgeneration %} marks what the assistant says; it renders as its contents between marks, which
        are empty unless they are asked for."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            start, end = (jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]) for name in GENERATION_VARIABLES)
            return [node.set_lineno(line) for node in (start, jinja2.nodes.Scope(body), end)]

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
    ) -> str:
        # jinja's own filter escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@functools.lru_cache(maxsize=8)
def _parsed(template: str) -> Any:
    try:
        return _environment().parse(template)
    except Exception as error:  # beside jinja's own errors a RecursionError
        raise InvalidError(f"the chat template is not valid: {_line(error)}") from error


@functools.lru_cache(maxsize=64)
def harmless(template: str) -> bool:
    """Whether rendering takes memory and time in proportion to the conversation.

    Of such a template every loop goes over a part of what the loop around it goes over, and inside a loop nothing is read but
    that loop's own part; it has no variables of its own, no macros, no calls, and no operators that multiply. Values can be
    looked at and written, never accumulated.

    Raises:
        PromptError: it is not valid jinja, or too long.
    """
    if len(template) > _LONGEST:
        raise PromptError(f"the chat template has {len(template):,} characters; at most {_LONGEST:,} are read")
    try:
        return len(template) <= _SHORT and _harmless(_parsed(template), None)
    except RecursionError:
        return False


@functools.lru_cache(maxsize=64)
def weight(template: str) -> int:
    """How often at most a harmless template goes over all that it is given: once for each name and loop in it."""
    from jinja2 import nodes

    return 1 + sum(1 for _ in _parsed(template).find_all((nodes.Name, nodes.For)))


def _harmless(node: Any, own: frozenset[str] | None) -> bool:
    """`own`: the names of the innermost loop's part, or None outside of loops."""
    from jinja2 import nodes

    if isinstance(node, nodes.For):
        if node.recursive or node.test or not _is_path(node.iter) or not _harmless(node.iter, own):
            return False
        names = frozenset(name.name for name in node.find_all(nodes.Name) if name.ctx == "store")
        targets = node.target.items if isinstance(node.target, nodes.Tuple) else [node.target]
        inside = frozenset(target.name for target in targets if isinstance(target, nodes.Name))
        body = [*node.body, *node.else_]
        return bool(inside) and inside <= names and all(_harmless(child, inside) for child in body)
    if isinstance(node, nodes.Name):
        return node.ctx == "load" and (own is None or node.name in own or node.name in _SMALL_NAMES)
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name) and node.node.name == "loop":
        return node.attr in _LOOP_ATTRIBUTES
    if isinstance(node, nodes.Filter):
        plain = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        return plain and node.name in _FILTERS and node.node is not None and _harmless(node.node, own)
    if isinstance(node, nodes.Call):
        plain = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        return plain and isinstance(node.node, nodes.Getattr) and node.node.attr in _METHODS and _harmless(node.node, own)
    if isinstance(node, (nodes.If, nodes.CondExpr)):
        rest = [child for child in node.iter_child_nodes() if child is not node.test]
        return _decides(node.test, own) and all(_harmless(child, own) for child in rest)
    if isinstance(node, nodes.Test):
        plain = not (node.args or node.kwargs or node.dyn_args or node.dyn_kwargs)
        return plain and node.name in _TESTS and _harmless(node.node, own)
    kinds: tuple[type, ...] = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const)
    kinds += (nodes.Getattr, nodes.Getitem, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not)
    kinds += (nodes.Concat, nodes.Add, nodes.List, nodes.Tuple)
    return type(node) in kinds and all(_harmless(child, own) for child in node.iter_child_nodes())


def _decides(node: Any, own: frozenset[str] | None) -> bool:
    """Whether an expression is a harmless condition. Of the whole conversation, which a loop may not read, it may ask whether a
    part is there, and whether it equals a constant, which take no time."""
    from jinja2 import nodes

    if isinstance(node, (nodes.And, nodes.Or, nodes.Not)):
        return all(_decides(child, own) for child in node.iter_child_nodes())
    if isinstance(node, nodes.Compare) and all(operand.op in ("eq", "ne") for operand in node.ops):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if sum(not isinstance(side, nodes.Const) for side in sides) == 1:
            return all(isinstance(side, nodes.Const) or _is_path(side) or _harmless(side, own) for side in sides)
    if isinstance(node, nodes.Test) and node.name in _TESTS and not node.args and _is_path(node.node):
        return True
    return _is_path(node) or _harmless(node, own)


def _is_path(node: Any) -> bool:
    """Whether an expression is a name, or a part of one found by constant keys."""
    from jinja2 import nodes

    while isinstance(node, nodes.Getattr) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const)):
        node = node.node
    return isinstance(node, nodes.Name) and node.name not in _SMALL_NAMES


@functools.lru_cache(maxsize=64)
def compile_template(template: str) -> Any:
    """The template, compiled in jinja2's immutable sandbox. Raises PromptError where it is not valid jinja."""
    try:
        return _environment().from_string(template)
    except MemoryError:  # of a constant that is worked out
        raise
    except Exception as error:  # beside jinja's own errors, what Python's compiler says about the program it made
        raise InvalidError(f"the chat template is not valid: {_line(error)}") from error


@functools.lru_cache(maxsize=64)
def variables_of(template: str) -> frozenset[str]:
    """The names that the template takes from outside. Raises PromptError where it is not valid jinja."""
    import jinja2.meta

    tree = _parsed(template)
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(tree)) - {*GENERATION_VARIABLES}
    except Exception as error:
        raise InvalidError(f"the chat template is not valid: {_line(error)}") from error


def run(template: str, variables: Mapping[str, Any], longest: int) -> str:
    """The text that the template makes of `variables`, JSON values by name.

    Raises:
        PromptError: the template is not valid, fails, or makes a text of more than `longest` characters.
    """
    compiled = compile_template(template)
    pieces, left = [], longest
    try:
        for piece in compiled.generate(**variables):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise ValueError(f"it makes a prompt of more than {longest:,} characters")
        return "".join(pieces)
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, and raises whatever its expressions raise
        raise PromptError(_line(error)) from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else text[:499] + "…"


def written(template: str, probes: list[dict[str, Any]], longest: int) -> list[str]:
    """The literals of a template, and what it makes of each of these variables unless it refuses them.

    Raises:
        PromptError: the template is not valid.
    """
    texts = literals(template)
    for variables in probes:
        try:
            texts.append(run(template, variables, longest))
        except InvalidError:
            raise
        except PromptError:  # it may refuse some, such as roles that it does not know
            continue
    return texts


def literals(template: str) -> list[str]:
    """The texts in a template that it may write: all but those that it compares with or looks up."""
    from jinja2 import nodes

    found: list[str] = []
    waiting: list[Any] = [_parsed(template)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, nodes.TemplateData):
            found.append(node.data)
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, nodes.Getitem):
            waiting.append(node.node)
        elif not isinstance(node, nodes.Compare):
            waiting.extend(node.iter_child_nodes())
    return found
