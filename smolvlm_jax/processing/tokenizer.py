"""SmolVLMTokenizer: a tokenizer.json behind the names that code for transformers uses."""

import functools
import json
import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, InputError
from ..io import write_json, write_text
from .batch import BatchFeature, check_return_tensors
from .choices import as_name, one_of
from .prompts import GRID_PATTERN, MEDIA_TOKENS
from .tokenizer_files import NAMED_TOKENS, guarded, named_templates, read_backend, read_config

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_UNLIMITED = 10**30
# A document checkpoint (docling) writes its markup with special tokens, which are text to the reader of its answers.
_MARKUP_SIGN = "<doctag>"
_MARKERS = "|".join(re.escape(token) for name, token in MEDIA_TOKENS.items() if name != "video_token")
_NOT_MARKUP = re.compile(rf"\||^({_MARKERS}|{GRID_PATTERN})$")


class SmolVLMTokenizer:
    """Text to ids and back.

    Args:
        backend: the tokenizers.Tokenizer that does the work; padding and truncation are switched off in it, since they
            are done here for each call.
        config: what tokenizer_config.json says.

    Attributes:
        bos_token: the string of this special token or None, like eos_token, unk_token, pad_token, sep_token, cls_token and
            mask_token. Each has an id: `eos_token_id` and so on.
        image_token: likewise, with fake_image_token, global_image_token, video_token, end_of_utterance_token and every
            name in the configuration's extra_special_tokens.
        padding_side: "left" or "right"; "right" unless the configuration says otherwise.
        truncation_side: "left" or "right"; "right" unless the configuration says otherwise.
        model_max_length: in tokens; 10³⁰ where the configuration does not say.
        chat_template: the configuration's template, or None.
        added_tokens: ids of all added tokens, by their strings.
        added_words: the strings alone.
        keep_markup: the default of `decode`'s keep_markup.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, backend: "Tokenizer", config: dict[str, Any] | None = None):
        config = dict(config or {})
        named = {**MEDIA_TOKENS, **{name: config.get(name) for name in NAMED_TOKENS}}
        for key in ("extra_special_tokens", "model_specific_special_tokens"):
            extra = config.get(key)
            named.update(extra if isinstance(extra, dict) else {})
        for name, token in config.items():
            if name.endswith("_token") and name not in NAMED_TOKENS and _content(token) and isinstance(_content(token), str):
                named[name] = token
        for name, token in named.items():
            if hasattr(type(self), name):
                raise CheckpointError(f"tokenizer_config.json: extra_special_tokens cannot name a token {name!r}")
            setattr(self, name, _content(token) or MEDIA_TOKENS.get(name))
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.config = self.init_kwargs = config
        self.padding_side = self.config.get("padding_side") or "right"
        self.truncation_side = self.config.get("truncation_side") or "right"
        self.model_max_length = self.config.get("model_max_length") or _UNLIMITED
        template = self.config.get("chat_template")
        self.chat_template = template if isinstance(template, str) else named_templates(template) or None
        self.added_tokens = {token.content: id for id, token in backend.get_added_tokens_decoder().items()}
        self.added_words = frozenset(self.added_tokens)
        self.keep_markup = _MARKUP_SIGN in self.added_tokens
        self._without: dict[frozenset[str], Tokenizer] = {}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, pre_tokenizer: str | None = None, **kwargs: Any
    ) -> "SmolVLMTokenizer":
        """The tokenizer of a checkpoint.

        Args:
            pretrained_model_name_or_path: a local directory with tokenizer.json (or vocab.json and merges.txt) and, where
                present, tokenizer_config.json, special_tokens_map.json and added_tokens.json; or one of these files.
            pre_tokenizer: "transformers-5" splits text as transformers 5 does, for comparisons: it reads the published
                checkpoints as GPT-2 tokenizers and drops the split into single digits that their tokenizer.json asks
                for, so that "\\n\\n1" gets other ids than the models were trained on. None keeps to the file.
            **kwargs: entries of tokenizer_config.json that override the file.

        Raises:
            CheckpointError: there is no tokenizer, or its files cannot be read.
            InputError: pre_tokenizer is neither None nor "transformers-5".
        """
        directory = os.fspath(pretrained_model_name_or_path)
        if os.path.isfile(directory):
            directory = os.path.dirname(directory)
        config = read_config(directory, kwargs)
        return cls(read_backend(directory, config, pre_tokenizer=pre_tokenizer), config)

    @classmethod
    def wrap(cls, tokenizer: Any) -> "SmolVLMTokenizer":
        """`tokenizer` itself if it is a SmolVLMTokenizer, otherwise one around a fast tokenizer of transformers.

        Raises:
            InputError: it is neither.
        """
        if isinstance(tokenizer, cls):
            return tokenizer
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise InputError(f"a tokenizer of type {type(tokenizer).__name__}; pass a SmolVLMTokenizer")
        from tokenizers import Tokenizer

        sides = ("padding_side", "truncation_side", "model_max_length", "chat_template")
        config = {name: getattr(tokenizer, name, None) for name in (*NAMED_TOKENS, *MEDIA_TOKENS, *sides)}
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        return cls(backend, {name: value for name, value in config.items() if value is not None})

    def save_pretrained(self, save_directory: str | os.PathLike) -> list[str]:
        """Write tokenizer.json and tokenizer_config.json to `save_directory`, which is made if need be.

        Returns:
            The paths of the files written.
        """
        return [
            write_text(os.path.join(save_directory, "tokenizer.json"), self.backend.to_str(pretty=True)),
            write_json(os.path.join(save_directory, "tokenizer_config.json"), self.config, sort_keys=True),
        ]

    # ---- the vocabulary

    @property
    def vocab_size(self) -> int:
        """Size of the base vocabulary, as transformers counts it; len(tokenizer) counts added tokens as well."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """The id of every token, added tokens included."""
        return self.backend.get_vocab(with_added_tokens=True)

    def __getattr__(self, name: str) -> Any:
        # eos_token_id, pad_token_id, …: the id of the token attribute of that name
        if name.endswith("_token_id") and name[: -len("_id")] in self.__dict__:
            token = self.__dict__[name[: -len("_id")]]
            return None if token is None else self.convert_tokens_to_ids(token)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set, by the names of their attributes."""
        return {name: getattr(self, name) for name in NAMED_TOKENS if getattr(self, name) is not None}

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that decode(skip_special_tokens=True) leaves out."""
        return sorted(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def control_tokens(self) -> frozenset[str]:
        """The tokens that `decode` leaves out with keep_markup: all added tokens but the markup of a document checkpoint."""
        markup = _MARKUP_SIGN in self.added_tokens
        return frozenset(token for token in self.added_tokens if not markup or _NOT_MARKUP.search(token))

    # ---- to ids

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """The ids of one text.

        Args:
            text: the text.
            add_special_tokens: add what tokenizer.json puts around every text.
            split_special_tokens: read special tokens in the text as the characters they are.

        Raises:
            InputError: the text is no string, or holds half of a surrogate pair.
        """
        return _encoding(self.plain_backend if split_special_tokens else self.backend, text, add_special_tokens).ids

    def encoding(self, text: str, add_special_tokens: bool = True) -> "Encoding":
        """As `encode`, with the offsets of each token."""
        return _encoding(self.backend, text, add_special_tokens)

    def encode_without(self, words: frozenset[str], text: str) -> list[int]:
        """The ids of a text for a tokenizer that does not have the added tokens `words`, but all others."""
        if words not in self._without:
            from tokenizers import Tokenizer

            description = json.loads(self.backend.to_str())
            description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in words]
            self._without[words] = Tokenizer.from_str(json.dumps(description))
        # By their names, since the other tokenizer numbers the tokens that are left anew.
        other: Any = self._without[words]
        return [self.convert_tokens_to_ids(other.id_to_token(id)) for id in _encoding(other, text, False).ids]

    def normalized(self, text: str) -> str:
        """A text as it is when added tokens with the flag `normalized` are looked for in it."""
        normalizer = self.backend.normalizer
        if normalizer is None:
            return text
        return guarded("normalise the text", InputError, lambda: normalizer.normalize_str(text))

    @functools.cached_property
    def normalized_words(self) -> frozenset[str]:
        """The added tokens that are looked for in normalised text; none where the tokenizer has no normaliser."""
        if self.backend.normalizer is None:
            return frozenset()
        return frozenset(token.content for token in self.backend.get_added_tokens_decoder().values() if token.normalized)

    def with_spaces(self, id: int, text: str, start: int, stop: int) -> tuple[int, int]:
        """Where an added token was found in a text, with the spaces that it takes along (lstrip, rstrip)."""
        token = self.backend.get_added_tokens_decoder()[id]
        if token.lstrip:
            start = len(text[:start].rstrip())
        if token.rstrip:
            stop += len(text[stop:]) - len(text[stop:].lstrip())
        return start, stop

    @functools.cached_property
    def plain_backend(self) -> "Tokenizer":
        """A copy of the backend that does not recognise special tokens in a text."""
        from tokenizers import Tokenizer

        plain = Tokenizer.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def __getstate__(self) -> dict[str, Any]:
        # The copies are made again where they are needed: their settings are not pickled with them.
        return {name: value for name, value in self.__dict__.items() if name != "plain_backend"} | {"_without": {}}

    def tokenize(self, text: str) -> list[str]:
        """The tokens of one text as strings."""
        return self.convert_ids_to_tokens(self.encode(text))

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """The id of a token, or a list of ids of several; an unknown one gets unk_token's id, None without unk_token."""
        if isinstance(tokens, str):
            id = self.backend.token_to_id(tokens)
            return self.backend.token_to_id(self.unk_token) if id is None and self.unk_token is not None else id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The token of an id, or a list of tokens of several ids."""
        if np.ndim(ids) == 0:
            return self.backend.id_to_token(int(ids))
        return [self.backend.id_to_token(int(id)) for id in ids]

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """The ids of a text or a list of texts.

        Args:
            text: one text, or a list of them.
            add_special_tokens: as in `encode`.
            split_special_tokens: as in `encode`.
            return_tensors: "np" for arrays, None for lists.
            **kwargs: padding, truncation, max_length, pad_to_multiple_of, padding_side, return_attention_mask, as in `pad`.

        Returns:
            input_ids and attention_mask (1 for real tokens), int64 (b, t) for return_tensors="np"; otherwise lists, for one
            text without the outer list.

        Raises:
            InputError: the text is no string and no list of strings, or what `pad` raises.
        """
        rows = [self.encode(entry, add_special_tokens, split_special_tokens) for entry in list_of_texts(text)]
        batch = self.pad(rows, return_tensors=return_tensors, **kwargs)
        if isinstance(text, str) and return_tensors is None:
            return BatchFeature({name: value[0] for name, value in batch.items()})
        return batch

    def pad(
        self,
        rows: list[list[int]],
        *,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Rows of ids, cut and padded to one length.

        Args:
            rows: the ids of each text.
            padding: True or "longest" pads to the longest row, "max_length" to max_length, False not at all.
            truncation: cut rows above max_length on truncation_side.
            max_length: in tokens; None takes model_max_length.
            pad_to_multiple_of: round the padded length up to a multiple of this.
            padding_side: "left" or "right"; None takes this tokenizer's.
            return_attention_mask: False leaves attention_mask out.
            return_tensors: "np" for arrays, None for lists.

        Returns:
            input_ids and attention_mask (1 for real tokens, 0 for padding), lists or int64 (b, t).

        Raises:
            InputError: rows of unequal length that are to become an array, no pad_token to pad with, or an argument that
                makes no sense.
        """
        check_return_tensors(return_tensors)
        padding = one_of("padding", as_name(padding or False).lower(), ("true", "longest", "max_length", "false", "do_not_pad"))
        side = one_of("padding_side", padding_side or self.padding_side, ("left", "right"))
        limit = max_length if max_length is not None else self.model_max_length
        if truncation and as_name(truncation).lower() != "do_not_truncate":
            if limit < 1:
                raise InputError(f"max_length is {limit}; truncation needs at least 1")
            rows = [row[-limit:] if self.truncation_side == "left" else row[:limit] for row in rows]
        longest, target = max(map(len, rows), default=0), 0
        if padding in ("true", "longest"):
            target = longest
        elif padding == "max_length":
            target = limit if limit < 10**20 else longest
        if pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
        pad_id = self.pad_token_id
        if pad_id is None and any(len(row) < target for row in rows):
            raise InputError("this tokenizer has no pad_token; set tokenizer.pad_token to pad with it")

        def filled(row: list[int], value: int) -> list[int]:
            fill = [value] * (target - len(row))
            return fill + row if side == "left" else row + fill

        batch = BatchFeature(input_ids=[filled(list(row), pad_id) for row in rows])
        if return_attention_mask is not False:
            batch["attention_mask"] = [filled([1] * len(row), 0) for row in rows]
        if return_tensors is None:
            return batch
        lengths = sorted(map(len, batch["input_ids"]))
        if lengths and lengths[0] < lengths[-1]:
            raise InputError(f"rows of {lengths[0]} to {lengths[-1]} tokens do not make one array; pass padding=True")
        return BatchFeature({name: np.array(rows, np.int64).reshape(len(lengths), -1) for name, rows in batch.items()})

    # ---- to text

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, keep_markup: bool | None = None, **_: Any
    ) -> str | list[str]:
        """The text of ids.

        Args:
            token_ids: one id, one row of ids, or several rows (lists or an array).
            skip_special_tokens: leave special tokens out.
            keep_markup: leave the control tokens out only, so that the markup of a document checkpoint stays. None takes
                this tokenizer's keep_markup, which is True where it knows <doctag>.

        Returns:
            A string, or a list of strings for several rows.

        Raises:
            InputError: an id is negative (−100 of labels, for example) or does not fit 32 bits.
        """
        rows = _as_list(token_ids)
        if isinstance(rows, (list, tuple)) and rows and np.ndim(rows[0]):
            return self.batch_decode(rows, skip_special_tokens, keep_markup)
        return self._decode_row(rows, skip_special_tokens, keep_markup)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, keep_markup: bool | None = None, **_: Any
    ) -> list[str]:
        """`decode` for each row of `sequences`."""
        return [self._decode_row(row, skip_special_tokens, keep_markup) for row in _as_list(sequences)]

    def _decode_row(self, row: Any, skip_special_tokens: bool, keep_markup: bool | None) -> str:
        row = _as_list(row)
        ids = [int(id) for id in ([row] if np.ndim(row) == 0 else row)]
        for id in ids:
            if id < 0 or id >= 2**32:
                raise InputError(f"cannot decode the id {id}")
        if skip_special_tokens and (self.keep_markup if keep_markup is None else keep_markup):
            dropped = {self.added_tokens[token] for token in self.control_tokens}
            ids, skip_special_tokens = [id for id in ids if id not in dropped], False
        decode = functools.partial(self.backend.decode, ids, skip_special_tokens=skip_special_tokens)
        return guarded("decode the ids", InputError, decode)

    def __repr__(self) -> str:
        return f"SmolVLMTokenizer(vocabulary {len(self)}, {self.special_tokens_map})"


def _encoding(backend: "Tokenizer", text: Any, add_special_tokens: bool) -> "Encoding":
    if not isinstance(text, str):
        raise InputError(f"text is a {type(text).__name__}; it needs a string")
    try:  # a regular expression of the tokenizer may not come to an end
        return guarded("tokenise the text", InputError, lambda: backend.encode(text, add_special_tokens=add_special_tokens))
    except InputError as error:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError("cannot tokenise the text: it holds half of a surrogate pair, which is no character") from error
        raise


def list_of_texts(text: Any) -> list[str]:
    """One text or several as a list. Raises InputError for anything else."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(entry, str) for entry in texts):
        raise InputError("text needs a string or a list of strings")
    return list(texts)


def _as_list(ids: Any) -> Any:
    """An array as nested lists, in one transfer from its device; anything else as it is."""
    return np.asarray(ids).tolist() if hasattr(ids, "__array__") else ids


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
