"""What models return: objects that are read by attribute, by name and by place, as in transformers."""

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

__all__ = ["ImageOutputs", "ModelOutput", "MultimodalOutput"]


class ModelOutput:
    """Base of the dataclasses that models return.

    `out.logits` is `out["logits"]`. By place, and as a tuple, only what was asked for counts: `out[0]` is the loss if there
    were labels, and the logits otherwise.
    """

    # Names that transformers has given to properties of an output, which are no entries of their own.
    ALIASES: ClassVar[tuple[str, ...]] = ()

    def keys(self) -> tuple[str, ...]:
        """What was asked for.

        Returns:
            The names, in order.
        """
        names = (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple(name for name in names if getattr(self, name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        """What was asked for.

        Returns:
            The values, in order.
        """
        return tuple(getattr(self, name) for name in self.keys())

    values = to_tuple

    def items(self) -> tuple[tuple[str, Any], ...]:
        """What was asked for.

        Returns:
            Pairs of name and value, in order.
        """
        return tuple(zip(self.keys(), self.to_tuple(), strict=True))

    def get(self, name: str, default: Any = None) -> Any:
        """One of the values.

        Args:
            name: what it is called.
            default: in place of what was not asked for.

        Returns:
            The value, or `default`.
        """
        return getattr(self, name) if name in self.keys() else default

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in (*self.keys(), *self.ALIASES):
                raise KeyError(f"{key!r} is not in this output; it has {', '.join(self.keys())}")
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclasses.dataclass(frozen=True)
class ImageOutputs(ModelOutput):
    """What was made of the pictures, as transformers 5.24 returns it.

    Attributes:
        pooler_output: image tokens (N, tokens, d), padding last.
    """

    pooler_output: Any


class MultimodalOutput(ModelOutput):
    """Base of the outputs with a cache and pictures: their names in transformers 5.24 beside those of 5.23."""

    ALIASES: ClassVar[tuple[str, ...]] = ("cache", "image_outputs")
    past_key_values: Any
    image_hidden_states: Any

    @property
    def cache(self) -> Any:
        """`past_key_values`."""
        return self.past_key_values

    @property
    def image_outputs(self) -> ImageOutputs | None:
        """`image_hidden_states`, as `image_outputs.pooler_output`."""
        return None if self.image_hidden_states is None else ImageOutputs(self.image_hidden_states)
