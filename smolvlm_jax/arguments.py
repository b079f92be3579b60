"""Arguments that several commands share, and help texts that show every default. Imports nothing heavy.

Options for the fields of a settings dataclass carry the fields' names, so that `given` can collect what the user set.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn

from .dtypes import full_name, what_instead
from .errors import InputError, first_few
from .media_options import PictureOptions, flag_of, kinds

__all__ = [
    "Parser",
    "add_check",
    "add_command",
    "add_machine",
    "add_model",
    "add_pictures",
    "add_quiet",
    "add_sampling",
    "given",
    "model_names",
    "nearest",
    "parse_mesh",
    "whole_numbers",
]

_AXES = ("data", "fsdp", "tensor")
_SAMPLING: dict[str, dict[str, Any]] = {
    "max_new_tokens": dict(type=int, metavar="N", help="largest number of tokens of an answer"),
    "do_sample": dict(action=argparse.BooleanOptionalAction, help="draw tokens instead of taking the most likely one"),
    "temperature": dict(type=float, help="divides the logits before drawing"),
    "top_k": dict(type=int, metavar="K", help="draw from the K most likely tokens; 0: from all"),
    "top_p": dict(type=float, metavar="P", help="draw from the most likely tokens that together reach probability P"),
    "min_p": dict(type=float, metavar="P", help="draw from tokens at least P times as likely as the most likely one"),
    "repetition_penalty": dict(type=float, help="divides the scores of tokens that are in the text already"),
    "repetition_window": dict(type=int, metavar="N", help="end an answer whose last N tokens repeat a pattern; 0: never"),
    "seed": dict(type=int, help="seed of the random draws"),
    "stop": dict(action="append", metavar="TEXT", help="end an answer before this text; the option may be repeated"),
    "ignore_eos": dict(action="store_true", help="go on to the limit, past stop tokens"),
}


# What is typed here for options of vLLM, transformers and TRL, and for other likely names: the end of a message. An option that
# the command lacks is not named.
_HABITS = {
    "--tensor-parallel-size": "--mesh tensor=N",
    "--data-parallel-size": "--mesh data=N",
    "--max-tokens": "--max-new-tokens",
    "--max-completion-tokens": "--max-new-tokens",
    "--max-length": "--max-new-tokens",
    "--num-workers": "--workers",
    "--num-proc": "--workers",
    "--dataloader-num-workers": "--workers",
    "--torch-dtype": "--dtype",
    "--precision": "--dtype",
    "--bf16": "--dtype bfloat16",
    "--fp32": "--dtype float32",
    "--attn-implementation": "--attention",
    "--model-name-or-path": "--model",
    "--model-id": "--model",
    "--model-path": "--model",
    "--checkpoint": "--model",
    "--lora": "--adapter",
    "--lora-path": "--adapter",
    "--peft-model": "--adapter",
    "--greedy": "--no-do-sample, which is the default of most checkpoints",
    "--sample": "--do-sample",
    "--stop-strings": "--stop",
    "--stop-sequences": "--stop",
    "--images": "--image",
    "--image-path": "--image",
    "--videos": "--video",
    **dict.fromkeys(
        ("--min-new-tokens", "--min-tokens", "--min-length"),
        "the least length of answers is the checkpoint's, min_new_tokens in its generation_config.json",
    ),
    "--num-beams": "nothing takes its place: answers are greedy or drawn, without beams",
    "--quantization": "weights in 8 bits are a checkpoint of their own: smolvlm-jax convert MODEL DEST --quantize int8",
    "--load-in-8bit": "weights in 8 bits are a checkpoint of their own: smolvlm-jax convert MODEL DEST --quantize int8",
    "--device": "jax chooses the device; JAX_PLATFORMS=cpu before the command keeps it on the CPU",
    "--device-map": "jax uses all devices; JAX_PLATFORMS=cpu before the command keeps it on the CPU",
    "--gpu-memory-utilization": "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 before the command sets jax's share of a GPU",
    "--trust-remote-code": "leave it out: a checkpoint's code is never run",
    "--tokenizer": "leave it out: the tokenizer is the checkpoint's own",
}
# The end of a message about a value that an option does not take.
_OF_VALUES: dict[str, Callable[[str], str]] = {
    "--dtype": what_instead,
    "--quantize": lambda word: "; leave it out to keep the weights as they are stored",
}
_NEAR = 0.75  # of difflib's ratio; below it what two names have in common is mostly chance


def _meant(word: str, flags: Collection[str], habits: Mapping[str, str]) -> str:
    """What to type in place of an option that there is not, as the end of a message; nothing if nobody knows."""
    instead = habits.get(word.replace("_", "-"), "")
    if instead.startswith("--") and re.split(r"[ ,]", instead)[0] not in flags:
        instead = ""
    if instead:
        return f"; {instead}" if " " in instead and not instead.startswith("--") else f"; did you mean {instead}?"
    bare = {flag.lstrip("-"): flag for flag in flags if flag.startswith("--")}  # the dashes are like each other anyway
    opposite = {"min": "max", "max": "min"}.get(word.lstrip("-")[:3])
    like = [name for name in bare if opposite is None or not name.startswith(opposite)]
    found = difflib.get_close_matches(word.lstrip("-"), like, n=2, cutoff=_NEAR)
    return f"; did you mean {' or '.join(bare[name] for name in found)}?" if found else ""


def nearest(word: str, known: Collection[str]) -> str:
    """The known words most like one that is not, as the end of a message: "; did you mean X?", or nothing."""
    found = difflib.get_close_matches(word, list(known), n=2, cutoff=_NEAR)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class _Store(argparse._StoreAction):
    """An option with one value. argparse keeps the last of several."""

    def __call__(self, parser, namespace, values, option_string=None):
        if self.option_strings and isinstance(parser, Parser):
            parser.take(self.option_strings[-1], values)
        super().__call__(parser, namespace, values, option_string)


class _Switch(argparse.BooleanOptionalAction):
    """An option that can be negated: --upscale, --no-upscale."""

    def __call__(self, parser, namespace, values, option_string=None):
        if isinstance(parser, Parser):
            parser.take(self.option_strings[0], option_string)
        super().__call__(parser, namespace, values, option_string)


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are told in one line, which names what is most like a word that is unknown. An option that is not
    collected may not be given twice with different values."""

    _words: Sequence[str] = ()
    habits: Mapping[str, str] = _HABITS  # what to type in place of other programs' options
    surplus = ""  # what to do about words too many, as the end of a message

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._taken: dict[str, Any] = {}
        for name in (None, "store"):
            self.register("action", name, _Store)
        self.register("action", argparse.BooleanOptionalAction, _Switch)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; the words are kept for messages."""
        self._words, self._taken = list(sys.argv[1:] if args is None else args), {}
        return super().parse_known_args(args, namespace)

    def take(self, flag: str, value: Any) -> None:
        """End with exit code 2 if the option has another value already."""
        before = self._taken.setdefault(flag, value)
        if _typed(before) != _typed(value):  # nan is not equal to itself
            self.error(f"{flag} is given twice, {_typed(before)} and {_typed(value)}: {_one_of(flag, before, value)}")

    def refuse(self, left: Sequence[str]) -> NoReturn:
        """End with exit code 2, since nothing reads these words."""
        for word in left:
            if word.startswith("-") and word != "-":
                self.error(f"unrecognized arguments: {word}")
        many = "one word" if len(left) == 1 else f"{len(left)} words"
        self.error(f"{', '.join(first_few(left))}: {many} too many{self.surplus}")

    def error(self, message: str) -> NoReturn:
        """End with exit code 2 and what is wrong."""
        wanted = message.removeprefix("the following arguments are required: ")
        names = [word.partition("=")[0] for word in self._words if word.startswith("--")]
        mistyped = [name for name in names if not any(flag.startswith(name) for flag in self._option_string_actions)]
        if wanted != message and mistyped:  # an argument is missing, perhaps since an option was not understood
            message = f"unrecognized arguments: {mistyped[0]}"
        elif wanted != message:  # argparse names those too that may be left out
            spare = [str(action.metavar) for action in self._actions if action.nargs == "*"]
            message = f"{', '.join(name for name in wanted.split(', ') if name not in spare)} is missing"
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown.split()[0].partition("=")[0]
            message = f"there is no option {word}{_meant(word, flags, self.habits)}"
        invalid = re.match(r"(argument .*: )?invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if invalid:
            where, word, known = invalid.groups()
            names = re.findall(r"[\w.-]+", known)
            where = "" if where is None or "COMMAND" in where else where
            instead = next((end(word) for flag, end in _OF_VALUES.items() if flag in where), nearest(word, names))
            message = f"{where}{word} is none of {', '.join(names)}{instead}"
        self.exit(2, f"{self.prog}: {message} (help: {self.prog} --help)\n")


def _typed(value: Any) -> str:
    """A value as it may have been typed."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "none"
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _one_of(flag: str, before: Any, value: Any) -> str:
    """What to do about two values: lists can be written as one."""
    if isinstance(before, tuple) and before and value:
        return f"a list is written as one, {flag} {_typed((*before, *value))}"
    return "leave one out"


class _Formatter(argparse.HelpFormatter):
    """Help texts with the default of every option, and examples as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.default is argparse.SUPPRESS or "(default: " in text:
            return text
        return f"{text} (default: {_shown(action.default)})"


def _shown(default: Any) -> str:
    """A default in words. None stands for what the checkpoint says."""
    words = {"None": "as the checkpoint says", "False": "off", "True": "on", "[]": "none", "()": "none"}
    return words.get(str(default), str(default))


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: Sequence[str] = (),
    habits: Mapping[str, str] | None = None,
    surplus: str = "",
) -> argparse.ArgumentParser:
    """Register a command.

    Args:
        commands: What `add_subparsers` returned.
        name: Of the command.
        run: From the parsed arguments to the exit code.
        help: One line for the list of commands.
        description: For the command's own help.
        examples: Command lines, shown at its end.
        habits: What to type in place of options that other programs have, beyond those of all commands.
        surplus: What to do about words too many, as the end of a message.
    """
    shown = "\n  ".join(("examples:", *examples)) if examples else None
    command = commands.add_parser(name, help=help, description=description, epilog=shown, formatter_class=_Formatter)
    command.set_defaults(run=run, parser=command)
    command.habits, command.surplus = {**_HABITS, **(habits or {})}, surplus
    return command


def add_model(parser: argparse.ArgumentParser, default: str) -> None:
    """--model, --adapter and --base, which `model_names` reads, and --check. `default`: what is taken where none is given."""
    group = parser.add_argument_group("model")
    model = f"bundled name, directory or Hub id (default: {default}; with --adapter what its config names)"
    group.add_argument("--model", metavar="NAME|DIR", help=model)
    adapter = "PEFT adapter (LoRA), a directory or Hub id, that is merged into the model (default: none)"
    group.add_argument("--adapter", metavar="DIR", help=adapter)
    base = "what an adapter given as --model is merged into (default: what its config names)"
    group.add_argument("--base", metavar="MODEL", help=base)
    add_check(group)


def model_names(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_model` as the arguments `model`, None where none is given or an adapter names it, and `adapter`.

    Raises:
        InputError: one of them is named twice.
    """
    model, adapter, base = options.model, options.adapter, options.base
    if base is not None:
        if adapter is not None and model is not None:
            raise InputError(f"the adapter {adapter} has two bases, --model {model} and --base {base}: name one")
        if adapter is None and model is None:
            raise InputError(f"--base {base} is what an adapter is merged into, and there is none: pass --adapter DIR")
        model, adapter = base, adapter or model
    return {"model": model, "adapter": adapter}


def add_check(parser: argparse._ActionsContainer) -> None:
    """--check"""
    parser.add_argument("--check", action="store_true", help="compare the arrays of the checkpoint with their checksums")


def add_sampling(parser: argparse.ArgumentParser, settings: type, *, without: Collection[str] = ()) -> None:
    """An option for each field of `settings`, a dataclass, whose defaults the help shows. What is not given is None."""
    group = parser.add_argument_group("sampling")
    for field in dataclasses.fields(settings):
        if field.name in _SAMPLING and field.name not in without:
            option = dict(_SAMPLING[field.name])
            option["help"] += f" (default: {_shown(field.default)})"
            group.add_argument("--" + field.name.replace("_", "-"), dest=field.name, default=None, **option)


def add_pictures(parser: argparse.ArgumentParser, *, without: Collection[str] = ()) -> None:
    """An option for each field of PictureOptions; do_upscale is --upscale and --no-upscale. What is not given is None."""
    group = parser.add_argument_group("pictures and videos")
    types = kinds()
    for field in dataclasses.fields(PictureOptions):
        if field.name in without:
            continue
        flag = flag_of(field.name)
        option: dict[str, Any] = {"dest": field.name, "default": None, "help": field.metadata["help"]}
        if bool in types[field.name]:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **option)
        else:
            group.add_argument(flag, type=_reader(*types[field.name]), metavar=_METAVARS[types[field.name][0]], **option)


_METAVARS = {int: "N", float: "X", str: "TEXT", dict: "JSON"}


def _reader(*types: type) -> Callable[[str], Any]:
    """From a word of the command line to a value of the first of these types that it can be."""

    def read(word: str) -> Any:
        if dict in types:
            return json.loads(word)
        for kind in types:
            with contextlib.suppress(ValueError):
                return kind(word)
        raise ValueError(word)

    read.__name__ = " or ".join("JSON" if kind is dict else kind.__name__ for kind in types)  # in argparse's message
    return read


def add_machine(
    parser: argparse.ArgumentParser,
    *,
    dtype: str = "bfloat16, on CPU float32",
    dtypes: Collection[str] = ("float32", "bfloat16"),
    mesh: str | None = None,
    attention: bool = True,
    cache: bool = False,
) -> argparse._ArgumentGroup:
    """--dtype, --attention, --mesh and --compilation-cache.

    Args:
        parser: Of the command.
        dtype: The default of --dtype, in words.
        dtypes: What --dtype may be, and other names of the same.
        attention: Whether there is --attention.
        mesh: What the mesh is for and its default, in words; None: there is no --mesh.
        cache: Whether there is --compilation-cache.

    Returns:
        The group, for options that only this command has.
    """
    group = parser.add_argument_group("machine")
    group.add_argument("--dtype", choices=dtypes, type=full_name, help=f"dtype of the weights (default: {dtype})")
    if attention:
        forms = "form of attention; einsum uses no kernels for TPUs and GPUs"
        group.add_argument("--attention", default="auto", metavar="FORM", help=forms)
    if mesh is not None:
        group.add_argument("--mesh", metavar="AXIS=N,…", help=mesh)
    if cache:
        where = "directory, or URL of an object store, in which compiled programs are kept for the next start"
        default = "JAX_COMPILATION_CACHE_DIR, else ~/.cache/smolvlm_jax/programs"
        group.add_argument("--compilation-cache", type=_named, metavar="DIR", help=f"{where} (default: {default})")
    return group


def add_quiet(parser: argparse._ActionsContainer, what: str) -> None:
    """--quiet; `what` says what is left out."""
    parser.add_argument("--quiet", action="store_true", help=what)


def given(options: argparse.Namespace, target: Callable) -> dict[str, Any]:
    """The arguments of `target`, a function or a dataclass, that the command line sets."""
    found = {name: getattr(options, name, None) for name in inspect.signature(target).parameters}
    return {name: value for name, value in found.items() if value is not None}


def _named(text: str) -> str:
    """The type of an option that names a directory: an empty name would be the current one."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: name a directory")
    return text


def whole_numbers(text: str) -> tuple[int, ...]:
    """The type of an option that takes a list such as 256,1024."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 256,1024") from None


def parse_mesh(text: str | None) -> dict[str, int] | None:
    """Sizes of the axes of a mesh from text like "data=1,fsdp=8,tensor=1"; axes left out are 1.

    Raises:
        InputError: if the text has another form.
    """
    if text is None:
        return None
    sizes = dict.fromkeys(_AXES, 1)
    left = list(_AXES)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in left or not size.strip().isdecimal() or int(size) < 1:
            raise InputError(
                f"{part!r} in --mesh {text} is not AXIS=SIZE with an axis of {', '.join(_AXES)}, each once, and a size from 1"
            )
        sizes[axis.strip()] = int(size)
        left.remove(axis.strip())
    return sizes
