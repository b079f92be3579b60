"""The pickle inside a `.bin` archive of torch, interpreted here: of a pickle's instructions those that make plain values and
describe tensors. A pickle is a program; nothing that it names is imported, and nothing is called."""

import pickletools
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_PICKLE", "SavedTensor", "Storage", "WouldRun", "read_state"]

MAX_PICKLE = 4_000_000  # bytes; torch writes about 200 for a tensor
_MAX_DEPTH = 100_000  # values that wait on the stack; torch's batches have two thousand

# torch's storage types -> dtypes
_STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in (
        ("Float", "float32"),
        ("Half", "float16"),
        ("BFloat16", "bfloat16"),
        ("Double", "float64"),
        ("Long", "int64"),
        ("Int", "int32"),
        ("Short", "int16"),
        ("Char", "int8"),
        ("Byte", "uint8"),
        ("Bool", "bool"),
    )
} | {"torch.storage UntypedStorage": "uint8"}
_DICT, _TENSOR, _PARAMETER = "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
# Everything a saved state dict refers to. Any other name in a pickle is something that it would run.
_ALLOWED = {_DICT, _TENSOR, _PARAMETER, *_STORAGES}


class WouldRun(ValueError):
    """A pickle names something that is none of a saved tensor's parts: unpickling would run it."""


@dataclass(frozen=True)
class Storage:
    """Values that the archive has under `data/KEY`: `size` of them, of one dtype."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True)
class SavedTensor:
    """A view of a storage. `offset` and `stride` count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> int:
        """How many values of the storage the view spans, from `offset` on."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True)
class _Name:
    """A global that the pickle refers to."""

    name: str


def _naturals(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _tensor(arguments: tuple) -> SavedTensor:
    """What `torch._utils._rebuild_tensor_v2` would make."""
    storage, offset, shape, stride, *rest = arguments
    if not isinstance(storage, Storage) or not _naturals((offset,)) or not _naturals(shape) or not _naturals(stride):
        # not quoted: tuples in tuples that are shared print as exponentially many
        raise ValueError("a tensor's offset, shape or stride is no size")
    if len(shape) != len(stride):
        raise ValueError(f"a tensor has the shape {shape} and the stride {stride}")
    if len(rest) > 2 and rest[2]:
        raise ValueError("a tensor is a conjugate or negative view")
    tensor = SavedTensor(storage, offset, shape, stride)
    if offset + tensor.extent > storage.size:
        raise ValueError(
            f"a tensor of shape {shape} and stride {stride} reaches from value {offset} to {offset + tensor.extent} "
            f"of a storage of {storage.size}"
        )
    return tensor


def _call(function: Any, arguments: Any) -> Any:
    """REDUCE, for the three functions that saved state dicts call."""
    name = function.name if isinstance(function, _Name) else None
    if not isinstance(arguments, tuple):
        raise ValueError("the arguments of a call are no tuple")
    if name == _DICT and not arguments:
        return {}
    if name == _TENSOR:
        return _tensor(arguments)
    if name == _PARAMETER and arguments and isinstance(arguments[0], SavedTensor):
        return arguments[0]
    raise ValueError(f"it calls {name or type(function).__name__} in a way that torch.save never writes")


def _storage(reference: Any) -> Storage:
    """What a persistent id stands for: ("storage", type, key, device, number of values)."""
    match reference:
        case ("storage", _Name(name), str(key), str(), int(size)) if name in _STORAGES and 0 <= size < 2**48:
            return Storage(key, _STORAGES[name], size)
    raise ValueError("it refers to a storage in a way that torch.save never writes")


class _Machine:
    """The stack, the marks in it and the memo of a pickle that is being interpreted."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One instruction. Raises ValueError or IndexError for what no saved state dict has."""
        stack = self.stack
        if len(stack) + len(self.marks) > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH:,} values wait on its stack")
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "GLOBAL" | "INST" | "STACK_GLOBAL" | "EXT1" | "EXT2" | "EXT4":
                if name == "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    argument = f"{module} {attribute}" if isinstance(module, str) and isinstance(attribute, str) else "?"
                named = f"extension {argument}" if name.startswith("EXT") else argument
                if named not in _ALLOWED or name == "INST":
                    raise WouldRun(named[:200].replace(" ", "."))
                stack.append(_Name(named))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}[name]())
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                self._need(count)
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = self._marked() if name == "APPENDS" else [stack.pop()]
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                for key, value in zip(items[::2], items[1::2], strict=True):
                    if not isinstance(key, str | int):
                        raise ValueError(f"a {type(key).__name__} is the key of a dict")
                    self._top(dict)[key] = value
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_call(stack.pop(), arguments))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "BUILD":
                stack.pop()  # the attributes of an OrderedDict, such as `_metadata`
                self._top(dict)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise ValueError(f"it recalls what it never stored, number {argument}")
                stack.append(self.memo[argument])
            case "STOP":
                self._need(1)
            case _:
                raise ValueError(f"torch.save never writes the instruction {name}")

    def _need(self, count: int) -> None:
        if len(self.stack) < count:
            raise ValueError("its stack is empty")

    def _marked(self) -> list[Any]:
        """The values above the last mark, taken off the stack."""
        start = self.marks.pop()
        found = self.stack[start:]
        del self.stack[start:]
        return found

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"it changes a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]


def read_state(pickled: bytes) -> Any:
    """What a pickle holds: plain values and, in place of tensors, `SavedTensor`.

    Raises:
        WouldRun: it names something that is none of a saved tensor's parts.
        ValueError: it is damaged, or does what torch.save never writes.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            machine.step(opcode.name, argument)
    except IndexError as error:
        raise ValueError("its stack is empty") from error
    return machine.stack[-1]
