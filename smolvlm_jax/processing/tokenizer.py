"""SmolVLMTokenizer: a tokenizer.json behind the names that code for transformers uses."""

import operator
import os
import re
import threading

import numpy as np

from ..errors import CheckpointError, InputError
from ..io import read_json, write_json, write_text
from .batch import BatchFeature

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# A document checkpoint (docling) writes its markup with special tokens; those are text to whoever reads the answer.
_MARKUP_SIGN = "<doctag>"
_NOT_MARKUP = re.compile(r"\||^<(image|fake_token_around_image|global-img|end_of_utterance|row_\d+_col_\d+)>$")


class SmolVLMTokenizer:
    """Text to ids and back.

    backend: a tokenizers.Tokenizer. config: what tokenizer_config.json says; bos_token, eos_token, unk_token,
    pad_token (strings), padding_side ("right" unless it says otherwise), truncation_side, model_max_length and the
    names in its extra_special_tokens (image_token, …) become attributes.
    """

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, backend, config: dict | None = None):
        self.backend = backend
        self.config = dict(config or {})
        self.init_kwargs = self.config
        for name in _NAMED_TOKENS:
            setattr(self, name, _content(self.config.get(name)))
        extra = {}
        for key in ("extra_special_tokens", "model_specific_special_tokens"):
            if isinstance(self.config.get(key), dict):
                extra.update(self.config[key])
        for name, token in extra.items():
            setattr(self, name, _content(token))
        for name, token in self.config.items():
            if name.endswith("_token") and name not in _NAMED_TOKENS and _content(token):
                setattr(self, name, _content(token))
        self.padding_side = self.config.get("padding_side") or "right"
        self.truncation_side = self.config.get("truncation_side") or "right"
        self.model_max_length = self.config.get("model_max_length") or 10**30
        self.chat_template = self.config.get("chat_template")
        self.added_tokens = {token.content: id for id, token in backend.get_added_tokens_decoder().items()}
        self.keep_markup = _MARKUP_SIGN in self.added_tokens
        self._plain = None
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "SmolVLMTokenizer":
        """From a directory with tokenizer.json (or vocab.json and merges.txt) and, where present,
        tokenizer_config.json, special_tokens_map.json and added_tokens.json; keywords override the configuration.

        pre_tokenizer="transformers-5": split text as transformers 5 does, which reads the published checkpoints as
        GPT-2 tokenizers and drops the split into single digits that their tokenizer.json asks for, so that "\\n\\n1"
        gets other ids than the models were trained on. For comparisons; None keeps to the file.
        Raises CheckpointError if there is no tokenizer or its files cannot be read.
        """
        from tokenizers import AddedToken, Tokenizer, pre_tokenizers

        split_as = kwargs.pop("pre_tokenizer", None)
        directory = os.fspath(pretrained_model_name_or_path)
        if os.path.isfile(directory):
            directory = os.path.dirname(directory)
        config = {
            **read_json(os.path.join(directory, "special_tokens_map.json"), missing_ok=True),
            **read_json(os.path.join(directory, "tokenizer_config.json"), missing_ok=True),
            **kwargs,
        }
        path = os.path.join(directory, "tokenizer.json")
        try:
            backend = Tokenizer.from_file(path) if os.path.exists(path) else _from_vocab(directory, config)
        except CheckpointError:
            raise
        except Exception as error:  # the backend raises bare Exception for whatever is wrong with the file
            raise CheckpointError(f"cannot read the tokenizer {path!r}: {error}") from error
        if split_as == "transformers-5":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        elif split_as is not None:
            raise InputError(f"pre_tokenizer is {split_as!r}; it is None or 'transformers-5'")
        # Padding and truncation are ours, per call.
        backend.no_padding()
        backend.no_truncation()
        known = set(backend.get_vocab(with_added_tokens=True))
        missing = [
            AddedToken(t["content"], **{k: t.get(k, False) for k in ("lstrip", "rstrip", "single_word", "normalized")})
            for _, t in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
            if t["content"] not in known
        ]
        missing += [
            AddedToken(content, normalized=False)
            for content, _ in sorted(
                read_json(os.path.join(directory, "added_tokens.json"), missing_ok=True).items(),
                key=operator.itemgetter(1),
            )
            if content not in known and content not in {token.content for token in missing}
        ]
        if missing:
            backend.add_special_tokens(missing)
        return cls(backend, config)

    @classmethod
    def wrap(cls, tokenizer) -> "SmolVLMTokenizer":
        """`tokenizer` itself if it is one of ours, or one of ours around a fast tokenizer of transformers.

        Raises InputError for anything else.
        """
        if isinstance(tokenizer, cls):
            return tokenizer
        if not hasattr(tokenizer, "backend_tokenizer"):
            raise InputError(f"a tokenizer of type {type(tokenizer).__name__}; pass a SmolVLMTokenizer")
        from tokenizers import Tokenizer

        names = (*_NAMED_TOKENS, "padding_side", "truncation_side", "model_max_length", "chat_template")
        names += ("image_token", "fake_image_token", "global_image_token", "end_of_utterance_token", "video_token")
        config = {name: getattr(tokenizer, name, None) for name in names}
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, {name: value for name, value in config.items() if value is not None})

    def save_pretrained(self, save_directory) -> list[str]:
        """Write tokenizer.json and tokenizer_config.json; returns their paths."""
        return [
            write_text(os.path.join(save_directory, "tokenizer.json"), self.backend.to_str(pretty=True)),
            write_json(os.path.join(save_directory, "tokenizer_config.json"), self.config, sort_keys=True),
        ]

    # ---- numbers of the vocabulary

    @property
    def vocab_size(self) -> int:
        """Size of the base vocabulary, as transformers counts it; len(tokenizer) counts added tokens as well."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)

    def __getattr__(self, name: str):
        # eos_token_id, pad_token_id, …: the id of the token attribute of that name
        if name.endswith("_token_id") and name[: -len("_id")] in self.__dict__:
            token = self.__dict__[name[: -len("_id")]]
            return None if token is None else self.convert_tokens_to_ids(token)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set."""
        return {name: getattr(self, name) for name in _NAMED_TOKENS if getattr(self, name) is not None}

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that decode(skip_special_tokens=True) leaves out."""
        return sorted(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @property
    def control_tokens(self) -> frozenset[str]:
        """The tokens that steer the model. All added tokens, save the markup of a document checkpoint."""
        if _MARKUP_SIGN not in self.added_tokens:
            return frozenset(self.added_tokens)
        return frozenset(token for token in self.added_tokens if _NOT_MARKUP.search(token))

    # ---- to ids

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """The ids of one text. split_special_tokens: special tokens in it are read as the characters they are."""
        if not isinstance(text, str):
            raise InputError(f"text is a {type(text).__name__}; it needs a string")
        backend = self.plain_backend() if split_special_tokens else self.backend
        try:
            return backend.encode(text, add_special_tokens=add_special_tokens).ids
        except Exception as error:  # lone surrogates
            raise InputError(f"cannot tokenise the text: {error}") from error

    def plain_backend(self):
        """The same tokenizer, blind to special tokens."""
        if self._plain is None:
            from tokenizers import Tokenizer

            with self._lock:
                if self._plain is None:
                    plain = Tokenizer.from_str(self.backend.to_str())
                    plain.encode_special_tokens = True
                    self._plain = plain
        return self._plain

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_plain", "_lock")}

    def __setstate__(self, state):
        self.__dict__.update(state, _plain=None, _lock=threading.Lock())

    def tokenize(self, text: str) -> list[str]:
        return self.convert_ids_to_tokens(self.encode(text))

    def convert_tokens_to_ids(self, tokens):
        """The id of a token or a list of tokens; the unknown token's id (None without one) for a stranger."""
        if isinstance(tokens, str):
            id = self.backend.token_to_id(tokens)
            if id is None and self.unk_token is not None:
                id = self.backend.token_to_id(self.unk_token)
            return id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids):
        """The token of an id, or of each in a list."""
        if np.ndim(ids) == 0:
            return self.backend.id_to_token(int(ids))
        return [self.backend.id_to_token(int(id)) for id in ids]

    def __call__(
        self,
        text,
        *,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """input_ids and attention_mask of a text or a list of texts; lists, or int64 (b, t) for return_tensors="np".

        Keywords: padding, truncation, max_length, pad_to_multiple_of, padding_side, return_attention_mask, as in `pad`.
        """
        single = isinstance(text, str)
        if not single and not (isinstance(text, (list, tuple)) and all(isinstance(t, str) for t in text)):
            raise InputError("text needs a string or a list of strings")
        rows = [self.encode(t, add_special_tokens, split_special_tokens) for t in ([text] if single else text)]
        batch = self.pad(rows, return_tensors=return_tensors, **kwargs)
        if single and return_tensors is None:
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

        padding: True or "longest" to the longest row, "max_length" to max_length, False not at all. truncation: cut
        rows above max_length (model_max_length where that is None) on truncation_side. padding_side: "left" or
        "right", this tokenizer's own where None. Returns input_ids and attention_mask (1 = real), lists or int64
        (b, t). Raises InputError for rows of unequal length that are to become an array.
        """
        padding = str(getattr(padding, "value", padding)).lower() if padding is not None else "false"
        if padding not in ("true", "longest", "max_length", "false", "do_not_pad"):
            raise InputError(f"padding is {padding!r}; it is True, False, 'longest' or 'max_length'")
        side = padding_side or self.padding_side
        if side not in ("left", "right"):
            raise InputError(f"padding_side is {side!r}; it is 'left' or 'right'")
        limit = max_length if max_length is not None else self.model_max_length
        if truncation and str(getattr(truncation, "value", truncation)).lower() != "do_not_truncate":
            if limit < 1:
                raise InputError(f"max_length is {limit}; truncation needs at least 1")
            rows = [row[-limit:] if self.truncation_side == "left" else row[:limit] for row in rows]
        target = None
        if padding in ("true", "longest"):
            target = max(map(len, rows), default=0)
        elif padding == "max_length":
            target = limit if limit < 10**20 else max(map(len, rows), default=0)
        if target is not None and pad_to_multiple_of:
            target = -(-target // pad_to_multiple_of) * pad_to_multiple_of
        pad_id = self.pad_token_id
        ids, masks = [], []
        for row in rows:
            fill = max(0, target - len(row)) if target is not None else 0
            if fill and pad_id is None:
                raise InputError("this tokenizer has no pad_token; set tokenizer.pad_token to pad with it")
            left, right = (fill, 0) if side == "left" else (0, fill)
            ids.append([pad_id] * left + list(row) + [pad_id] * right)
            masks.append([0] * left + [1] * len(row) + [0] * right)
        batch = BatchFeature(input_ids=ids, attention_mask=masks)
        if return_attention_mask is False:
            del batch["attention_mask"]
        if return_tensors is None:
            return batch
        if len({len(row) for row in ids}) > 1:
            lengths = sorted({len(row) for row in ids})
            raise InputError(f"rows of {lengths[0]} to {lengths[-1]} tokens do not make one array; pass padding=True")
        return BatchFeature({name: np.array(rows, np.int64).reshape(len(ids), -1) for name, rows in batch.items()})

    # ---- to text

    def decode(self, token_ids, skip_special_tokens: bool = False, keep_markup: bool | None = None, **_) -> str | list[str]:
        """The text of ids: one row, or a list of texts for rows of ids.

        skip_special_tokens: leave special tokens out. keep_markup: only the control tokens then, so that the markup
        of a document checkpoint stays; None takes this tokenizer's keep_markup, True where it knows <doctag>.
        Raises InputError for an id that is negative (a label of −100, say).
        """
        if hasattr(token_ids, "__array__"):
            token_ids = np.asarray(token_ids).tolist()  # one transfer, not one per id
        if np.ndim(token_ids) == 0:
            token_ids = [token_ids]
        if len(token_ids) and np.ndim(token_ids[0]):
            return self.batch_decode(token_ids, skip_special_tokens, keep_markup)
        ids = [int(id) for id in token_ids]
        if any(id < 0 or id >= 2**32 for id in ids):
            raise InputError(f"cannot decode the id {next(id for id in ids if id < 0 or id >= 2**32)}")
        if skip_special_tokens and (self.keep_markup if keep_markup is None else keep_markup):
            dropped = {self.added_tokens[token] for token in self.control_tokens}
            ids, skip_special_tokens = [id for id in ids if id not in dropped], False
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences, skip_special_tokens: bool = False, keep_markup: bool | None = None, **_) -> list[str]:
        """`decode` for each row."""
        if hasattr(sequences, "__array__"):
            sequences = np.asarray(sequences).tolist()
        return [self.decode(row, skip_special_tokens, keep_markup) for row in sequences]

    def __repr__(self):
        return f"SmolVLMTokenizer(vocabulary {len(self)}, {self.special_tokens_map})"


def _content(token) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _from_vocab(directory: str, config: dict):
    """A byte-level BPE from vocab.json and merges.txt, as GPT-2 has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = os.path.join(directory, "vocab.json"), os.path.join(directory, "merges.txt")
    if not (os.path.exists(vocab) and os.path.exists(merges)):
        raise CheckpointError(f"no tokenizer in {directory!r}: neither tokenizer.json nor vocab.json with merges.txt")
    backend = Tokenizer(models.BPE.from_file(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    inside = {id: content for content, id in read_json(vocab).items()}
    for id, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        if inside.get(int(id)) == token["content"]:
            backend.add_special_tokens([AddedToken(token["content"], normalized=False)])
    return backend
