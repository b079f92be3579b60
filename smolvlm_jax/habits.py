"""Arguments of transformers without a counterpart here: accepted with values that change nothing, refused by name with others;
and calls with wrong arguments.

A table lists for each of these arguments the values that change nothing. The functions that take keywords from outside each
have one table, and check their keywords with `unasked`.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeVar

from .errors import ArgumentError, HabitError, InputError, SmolVLMError

__all__ = [
    "ANY", "Neutral", "SaysWhatToType", "asks_for_something", "named_arguments", "no_attribute", "no_part",
    "plain_value", "require_agreement", "torch_name", "unasked",
    "unbound", "unchanging", "unknown_argument",
]  # fmt: skip


class _Any(tuple):
    """Holds everything."""


# The neutral values of an argument that is taken and never read.
ANY = _Any()


class Neutral(NamedTuple):
    """An argument of transformers that does nothing here.

    Attributes:
        values: what asks for nothing, beside None.
        instead: what to type where it is meant.
    """

    values: tuple[Any, ...] = ()
    instead: str = ""


def unasked(where: str, given: Mapping[str, Any], neutral: Mapping[str, Neutral], known: Iterable[str]) -> dict[str, Any]:
    """The keywords of a call without those that ask for nothing.

    Args:
        where: the function, for messages.
        given: keywords by name.
        neutral: of the function.
        known: the keywords that it uses.

    Raises:
        InputError: a keyword is neither known nor neutral, or asks for something that there is not.
    """
    known = frozenset(known)
    left = {}
    for name, value in given.items():
        if name in known:
            left[name] = value
        elif name not in neutral:
            raise unknown_argument(where, name, known, (*known, *neutral))
        elif asks_for_something(value, neutral[name]):
            instead = neutral[name].instead
            raise InputError(f"{where} does not support {name}={value!r:.80}" + (f"; {instead}" if instead else ""))
    return left


def require_agreement(
    where: str, given: Mapping[str, Any], reading: Callable[[Any], Any] | None = None, error: type[SmolVLMError] = InputError
) -> None:
    """Refuse a call that gives an argument under two names, unless both mean the same.

    Args:
        where: the function, for messages.
        given: the argument's values by name. None is not given.
        reading: from a value to what it means; default: `plain_value`.
        error: the exception to raise.

    Raises:
        SmolVLMError: an `error`: two values differ.
    """
    reading = reading or plain_value
    (first, value), *others = [pair for pair in given.items() if pair[1] is not None] or [("", None)]
    for name, other in others:
        if reading(other) != reading(value):
            raise error(
                f"{where}: {first}={value!r:.80} and {name}={other!r:.80} are two names for one thing and differ: leave one out"
            )


# Names that other libraries have for arguments, and ours, of which the first that a function has is named.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_gen_toks"), ("max_new_tokens",)),
    **dict.fromkeys(("n", "num_samples"), ("num_return_sequences",)),
    "temp": ("temperature",),
    "stop_token_ids": ("eos_token_id",),
    "top_logprobs": ("logprobs",),
    "torch_dtype": ("dtype",),
    "attn_implementation": ("attention",),
    **dict.fromkeys(("model", "model_parallel", "tp", "mp", "tensor_parallel"), ("tensor",)),
    **dict.fromkeys(("dp", "data_parallel", "batch"), ("data",)),
    **dict.fromkeys(("path", "model_id", "repo_id", "pretrained_model_name_or_path", "input"), ("source",)),
    **dict.fromkeys(("output", "output_dir", "out", "dest", "save_directory"), ("destination", "directory")),
    **dict.fromkeys(("overwrite", "exist_ok"), ("force",)),
    **dict.fromkeys(("processor", "tokenizer"), ("companions",)),
}


def unknown_argument(where: str, name: str, known: Iterable[str], names: Iterable[str] = ()) -> ArgumentError:
    """The error for a keyword that nothing reads, with the name that was probably meant."""
    known = sorted(known)
    every = [*known, *names]
    swapped = [other for other in every if sorted(other) == sorted(name)]  # letters in another order
    swapped += [ours for ours in _OTHER_NAMES.get(name, ()) if ours in known]
    close = swapped or get_close_matches(name, every, 1)
    meant = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(known)}"
    return ArgumentError(f"{where} has no argument {name!r}{meant}")


_Target = TypeVar("_Target", bound=Callable[..., Any])


def named_arguments(target: _Target) -> _Target:
    """Let a function, or a class by its constructor, say which argument was probably meant where a call does not fit it.

    Args:
        target: the function or class; of a dataclass, what `@dataclass` has made.

    Returns:
        The class itself, or a function of the same signature. Calls that do not fit it raise ArgumentError.
    """
    call: Any = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]

    @functools.wraps(call)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except TypeError:  # of this call, or of anything within it
            problem = _misfit(target.__name__, call, args, kwargs)
            if problem is None:
                raise
            raise problem from None

    if not isinstance(target, type):
        return checked  # type: ignore[return-value]
    target.__init__ = checked  # type: ignore[misc]
    return target


def _misfit(where: str, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ArgumentError | None:
    """What is wrong with the arguments of a call; None if nothing is."""
    signature = inspect.signature(call)
    parameters = {name: one for name, one in signature.parameters.items() if name != "self"}
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name in kwargs:
        if name not in parameters and not open_ended:
            return unknown_argument(where, name, parameters)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        needed = [name for name, one in parameters.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
        shown = ", ".join(f"{name}=…" for name in needed or list(parameters)[:1])
        return ArgumentError(f"{where}: {error}; call it as {where}({shown})")
    return None


def no_attribute(value: Any, name: str, instead: Mapping[str, str] | None = None) -> AttributeError:
    """The error for an attribute that a value does not have.

    Args:
        value: what it is looked up in, an object or a class.
        name: of the attribute; of a private one the error is Python's own.
        instead: what to type, by name, for attributes that transformers has.
    """
    kind = value.__name__ if isinstance(value, type) else type(value).__name__
    if name.startswith("_"):
        return AttributeError(f"{kind!r} has no attribute {name!r}")
    if instead and name in instead:
        return HabitError(f"{kind}.{name}: {instead[name]}")
    close = get_close_matches(name, [known for known in dir(value) if not known.startswith("_")], 1)
    return HabitError(f"{kind} has no attribute {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


class SaysWhatToType(type):
    """The class of classes under transformers' names: looking up what one of them does not have is an error of ours.

    Attributes:
        _instead: what to type, by name, for attributes that transformers has.
    """

    _instead: Mapping[str, str] = {}

    def __getattr__(cls, name: str) -> Any:
        raise no_attribute(cls, name, cls._instead)


def unchanging(cls: Any, instead: str) -> None:
    """Let a frozen dataclass say what to type instead of an assignment to one of its fields: `instead`, with `{name}`."""

    def __setattr__(self: Any, name: str, value: Any) -> None:
        raise HabitError(f"{type(self).__name__}.{name} cannot be assigned: {instead.format(name=name)}")

    cls.__setattr__ = __setattr__


def asks_for_something(value: Any, neutral: Neutral) -> bool:
    """Whether a value is other than None and the neutral ones."""
    if value is None or neutral.values is ANY or any(value is entry for entry in neutral.values):
        return False
    value = plain_value(value)
    simple = isinstance(value, (bool, int, float, str, list, tuple, dict))
    return not (simple and any(value == entry for entry in neutral.values))


def plain_value(value: Any) -> Any:
    """A number or bool of numpy, jax or torch as Python's own, an array of them as a list; anything else as it is."""
    numbers = hasattr(value, "tolist") and hasattr(value, "dtype") and not isinstance(value, type)
    return value.tolist() if numbers else value


def torch_name(value: Any) -> Any:
    """torch's dtypes and devices by their names: torch.bfloat16 -> "bfloat16"; anything else as it is."""
    if type(value).__module__.partition(".")[0] == "torch":
        value = str(value)
    return value.removeprefix("torch.") if isinstance(value, str) else value


# What torch's modules and transformers' models have, and how it is said here. `{name}` is what the message calls the model.
_STATELESS = "a model is a description without parameters"
_INSTEAD = {
    "from_pretrained": "load(source) gives the model and its parameters: model, params = load(source)",
    "generate": f"{_STATELESS}: generate(model, params, **inputs), or AutoModelForImageTextToText.from_pretrained",
    "stream": f"{_STATELESS}: stream(model, params, **inputs) yields tokens as they are drawn",
    "chat": "inputs = processor.encode_chat(messages), then generate(model, params, **inputs)",
    "forward": f'{_STATELESS}: model.apply({{"params": params}}, **inputs)',
    "save_pretrained": "save_hf(directory, model, params) writes a checkpoint for transformers, save(…) one of orbax",
    "push_to_hub": "save_hf(directory, model, params), then huggingface_hub's upload_folder",
    "state_dict": f"{_STATELESS}: params is a nested dict, and parameters.flatten_params names its arrays",
    "load_state_dict": f"{_STATELESS}: `smolvlm-jax convert` and load(source) read checkpoints of torch",
    "device": f"{_STATELESS}: its arrays know their devices, jax.tree.leaves(params)[0].devices()",
    "gradient_checkpointing_enable": 'model.clone(remat="full")',
    "gradient_checkpointing_disable": "model.clone(remat=False)",
    "compile": "generate is compiled as it is; jax.jit(model.apply) compiles a call",
    "set_attn_implementation": "load(source, attention=…), or model.clone(attention=…)",
    "compute_transition_scores": "return_dict_in_generate=True with output_scores=True gives the scores of each token",
    "get_memory_footprint": "sum(array.nbytes for array in jax.tree.leaves(params))",
    "name_or_path": "a model does not keep the name that it was loaded by",
    "get_input_embeddings": 'the embedding is params["model"]["text_model"]["embed_tokens"]',
    "get_output_embeddings": 'the output head is params["lm_head"], or the embedding where it is tied',
    "resize_token_embeddings": "the vocabulary is part of the checkpoint: resize it in transformers, then convert it",
    **dict.fromkeys(
        ("to", "cuda", "cpu"), f"{_STATELESS}: jax.device_put(params, device) places them, load(source, mesh=…) on several"
    ),
    **dict.fromkeys(
        ("half", "float", "double", "bfloat16", "type"),
        f"{_STATELESS}: load(source, dtype=…) reads them in another dtype, model.clone(dtype=…) computes in one",
    ),
    **dict.fromkeys(
        ("parameters", "named_parameters", "num_parameters", "buffers", "modules", "named_modules", "children"),
        f"{_STATELESS}: params is a nested dict, jax.tree.leaves(params) its arrays",
    ),
    **dict.fromkeys(
        ("train", "requires_grad_", "zero_grad"),
        f"{_STATELESS}: training is `smolvlm-jax train`, or jax.grad of a function of params",
    ),
    **dict.fromkeys(
        ("load_adapter", "add_adapter", "set_adapter", "merge_and_unload"),
        "adapters are merged when they are read: load(directory of the adapter, base=…)",
    ),
}


# Modules inside a model, and others whose attributes are typed from habit.
_PARTS = ("model", "text_model", "vision_model", "vision_tower", "connector", "lm_head", "layers", "embed_tokens", "encoder")


def no_part(name: str, part: str, *, bound: bool = False) -> HabitError:
    """The error for an attribute that a model does not have; `bound` as in `unbound`."""
    stateless = "" if bound else f"{_STATELESS}: "
    if part in _PARTS:
        return HabitError(
            f'{name}.{part}: {stateless}those of its parts stand under their names in params, and model.apply({{"params": '
            'params}, …, method=…) calls a method of the model, such as "get_image_features"'
        )
    if bound:
        return HabitError(f"{name} has no attribute {part!r}; model, params = … are what the functions of smolvlm_jax take")
    return HabitError(f"{name} has no attribute {part!r}: {_STATELESS}, which the functions load, generate and save_hf take")


def unbound(name: str, method: str | None = None, *, bound: bool = False) -> HabitError | None:
    """The error for what somebody does with a model as in torch, or None if it is no habit of transformers.

    Args:
        name: of the model's class.
        method: what is looked up; None: the model is called.
        bound: whether the model has its parameters with it.
    """
    if method is None:
        apply = "its arguments" if name.endswith(("Transformer", "Connector", "TextModel")) else "**inputs"
        whole = "; generate(model, params, **inputs) continues prompts" if name.endswith("Generation") else ""
        return HabitError(f'{name} is called without parameters: type model.apply({{"params": params}}, {apply}){whole}')
    if method not in _INSTEAD:
        return None
    return HabitError(f"{name}.{method}: {_INSTEAD[method].removeprefix(f'{_STATELESS}: ' if bound else '')}")
