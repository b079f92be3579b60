"""The keywords with which texts become rows of ids, and the rows one batch: cut, padded, as arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ..errors import InputError
from ..habits import Neutral, plain_value, unasked
from .batch import BatchFeature, as_tensors, check_return_tensors
from .choices import as_name, one_of

__all__ = ["TEXT_NEUTRAL", "TEXT_OPTIONS", "TextOptions", "list_of_texts", "make_batch", "plain_rows"]

_PADDING = ("true", "longest", "max_length", "false", "do_not_pad")
_TRUNCATION = ("true", "longest_first", "only_first", "only_second", "false", "do_not_truncate")
# What a column holds where its row is padded; the ids have the pad token. Other columns are not padded, as in the reference.
_FILLS = {"attention_mask": 0, "special_tokens_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0, "offset_mapping": (0, 0)}
_UNEQUAL = "rows of {} to {} tokens do not make one array; pass padding=True"

# Keywords of transformers' tokenizers that a decoder of single texts has no use for.
TEXT_NEUTRAL: dict[str, Neutral] = {
    **dict.fromkeys(("text_pair", "text_target", "text_pair_target"), Neutral((), "pass the texts as one")),
    "is_split_into_words": Neutral((False,), "join the words"),
    "stride": Neutral((0,)),
    "return_overflowing_tokens": Neutral((False,)),
    "return_token_type_ids": Neutral((False,), "the model reads none"),
    "return_text_replacement_offsets": Neutral((False,)),
    "sanitize_control_tokens": Neutral((False,), "pass special_tokens_in_text='escape' to apply_chat_template"),
    "verbose": Neutral((True, False)),
    "tokenizer_kwargs": Neutral(({},), "pass its keywords on their own"),
}


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Keywords under the names of transformers, as `SmolVLMTokenizer.__call__` describes them. None takes the default."""

    add_special_tokens: bool | None = True
    split_special_tokens: bool | None = False
    padding: bool | str | None = False
    truncation: bool | str | None = None
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None
    return_attention_mask: bool | None = None
    return_special_tokens_mask: bool | None = False
    return_offsets_mapping: bool | None = False
    return_length: bool | None = False
    return_mm_token_type_ids: bool | None = False
    return_tensors: str | None = None

    @classmethod
    def of(cls, where: str, keywords: Mapping[str, Any]) -> "TextOptions":
        """The options of a call. Raises InputError for a keyword that is none, or asks for what there is not."""
        given = unasked(where, keywords, TEXT_NEUTRAL, TEXT_OPTIONS)
        if given.get("max_length") is not None and not given.get("padding") and given.get("truncation") is None:
            given["truncation"] = True  # as in transformers, where max_length alone asks for it
        made = cls(**{name: plain_value(value) for name, value in given.items()})
        return made if made.add_special_tokens is not None else cls(**{**given, "add_special_tokens": True})

    def __post_init__(self) -> None:
        check_return_tensors(self.return_tensors)
        one_of("padding", self.padding_name, _PADDING)
        one_of("truncation", self.truncation_name, _TRUNCATION)
        for name in ("max_length", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise InputError(f"{name} is {value!r:.80}; it is a number of tokens")

    @property
    def padding_name(self) -> str:
        """`padding` as one of the names that it may have."""
        return as_name(self.padding or False).lower()

    @property
    def truncation_name(self) -> str:
        """`truncation` as one of the names that it may have."""
        return as_name(self.truncation or False).lower()


TEXT_OPTIONS = frozenset(field.name for field in fields(TextOptions))


def make_batch(
    columns: Mapping[str, list],
    options: TextOptions,
    *,
    pad_token_id: int | None,
    padding_side: str,
    truncation_side: str,
    model_max_length: float,
) -> BatchFeature:
    """Rows of ids and what describes their tokens, cut and padded to one length.

    Args:
        columns: `input_ids`, a list of ids for each text, and further columns by name with an entry for each id.
        options: of the call; None there takes the tokenizer's setting.
        pad_token_id, padding_side, truncation_side, model_max_length: of the tokenizer.

    Returns:
        input_ids, the other columns, and attention_mask (1 for real tokens, 0 for padding), lists or arrays (b, t).

    Raises:
        InputError: rows of unequal length that are to become an array, no pad token to pad with, or a side or length that makes
            no sense.
    """
    side = one_of("padding_side", options.padding_side or padding_side, ("left", "right"))
    limit = options.max_length if options.max_length is not None else model_max_length
    rows = dict(columns)
    if options.truncation_name not in ("false", "do_not_truncate"):
        if limit < 1:
            raise InputError(f"max_length is {limit}; truncation needs at least 1")
        kept = slice(-int(limit), None) if truncation_side == "left" else slice(int(limit))
        rows = {name: [row[kept] for row in column] for name, column in rows.items()}
    ids = rows["input_ids"]
    longest, target = max(map(len, ids), default=0), 0
    if options.padding_name in ("true", "longest"):
        target = longest
    elif options.padding_name == "max_length":
        target = int(limit) if limit < 10**20 else longest
    if options.pad_to_multiple_of:
        target = -(-target // options.pad_to_multiple_of) * options.pad_to_multiple_of
    if pad_token_id is None and any(len(row) < target for row in ids):
        raise InputError("this tokenizer has no pad_token; set tokenizer.pad_token to pad with it")
    if options.return_attention_mask is False:
        rows.pop("attention_mask", None)
    elif "attention_mask" not in rows:
        rows["attention_mask"] = [[1] * len(row) for row in ids]

    def filled(row: list, value: Any) -> list:
        fill = [value] * (target - len(row))
        return fill + list(row) if side == "left" else list(row) + fill

    fills = {"input_ids": pad_token_id, **_FILLS}
    batch = BatchFeature(
        {name: [filled(row, fills[name]) for row in column] if name in fills else column for name, column in rows.items()}
    )
    if options.return_length:
        batch["length"] = [len(row) for row in batch["input_ids"]]
    lengths = sorted(map(len, batch["input_ids"]))
    if options.return_tensors is not None and lengths and lengths[0] < lengths[-1]:
        raise InputError(_UNEQUAL.format(lengths[0], lengths[-1]))
    return as_tensors(batch, options.return_tensors)


def list_of_texts(text: Any) -> list[str]:
    """One text or several as a list. Raises InputError for anything else."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(entry, str) for entry in texts):
        raise InputError("text needs a string or a list of strings")
    return list(texts)


def plain_rows(ids: Any) -> Any:
    """Arrays and tuples as nested lists of Python's numbers, an array in one transfer from its device."""
    if hasattr(ids, "__array__") and not isinstance(ids, np.generic):
        ids = np.asarray(ids).tolist()
    if isinstance(ids, (list, tuple)):
        # the usual case first: a row of numbers needs no walk
        return list(ids) if all(type(id) is int for id in ids) else [plain_rows(id) for id in ids]
    return plain_value(ids)
