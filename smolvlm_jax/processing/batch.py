"""The mapping that every processor returns."""

from typing import Any

from ..errors import InputError
from .choices import as_name


class BatchFeature(dict[str, Any]):
    """A dict whose keys are attributes too: `batch["input_ids"]` is `batch.input_ids`, and `model(**batch)` works."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this batch has no {name!r}; it has {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            shape = getattr(value, "shape", None)
            return f"{value.dtype}{list(shape)}" if shape is not None else repr(value)

        return f"BatchFeature({', '.join(f'{key}: {show(value)}' for key, value in self.items())})"


def check_return_tensors(return_tensors: object) -> None:
    """Raise InputError unless `return_tensors` is None or "np"; pictures are numpy arrays in either case."""
    if return_tensors is not None and as_name(return_tensors) != "np":
        raise InputError(f"return_tensors is {return_tensors!r}; pass 'np' and hand the arrays to jax.numpy.asarray")
