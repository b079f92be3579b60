"""The mapping that every processor returns."""


class BatchFeature(dict):
    """A dict whose keys are attributes too: `batch["input_ids"]` is `batch.input_ids`, `model(**batch)` works."""

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this batch has no {name!r}; it has {sorted(self)}") from None

    def __setattr__(self, name: str, value):
        self[name] = value

    def __repr__(self):
        def show(value):
            shape = getattr(value, "shape", None)
            return f"{value.dtype}{list(shape)}" if shape is not None else repr(value)

        return f"BatchFeature({', '.join(f'{key}: {show(value)}' for key, value in self.items())})"
