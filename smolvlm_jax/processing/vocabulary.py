"""The tokens of a tokenizer: their ids, those that have names, those that were added."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError, InputError
from ..habits import SaysWhatToType, no_attribute, unknown_argument
from .prompts import GRID_PATTERN, MEDIA_TOKENS
from .tokenizer_files import NAMED_TOKENS, guarded, named_templates

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Vocabulary"]

_UNLIMITED = 10**30
# A document checkpoint (docling) writes its markup with special tokens, which are text to the reader of its answers.
_MARKUP_SIGN = "<doctag>"
_MARKERS = "|".join(re.escape(token) for name, token in MEDIA_TOKENS.items() if name != "video_token")
_NOT_MARKUP = re.compile(rf"\||^({_MARKERS}|{GRID_PATTERN})$")
# Methods of transformers' tokenizers, and what there is in their place.
_INSTEAD = {
    "apply_chat_template": "SmolVLMProcessor has it",
    "push_to_hub": "save_pretrained(directory), then huggingface_hub's upload_folder",
    "backend_tokenizer": "it is called backend",
    "name_or_path": "a tokenizer does not keep the name that it was loaded by",
    "train_new_from_iterator": "train it with the tokenizers package, and wrap it: SmolVLMTokenizer(tokenizer)",
    "save_vocabulary": "save_pretrained(directory) writes tokenizer.json",
    "build_inputs_with_special_tokens": "tokenizer.encode(text) adds what tokenizer.json puts around a text",
    "get_special_tokens_mask": "tokenizer(text, return_special_tokens_mask=True)",
    "additional_special_tokens": "it is called extra_special_tokens",
    **dict.fromkeys(("encode_plus", "batch_encode_plus", "prepare_for_model"), "call the tokenizer: tokenizer(texts)"),
    **dict.fromkeys(("as_target_tokenizer", "truncate_sequences", "num_special_tokens_to_add"), "there are no pairs of texts"),
}


class Vocabulary(metaclass=SaysWhatToType):
    """Base of SmolVLMTokenizer, which describes the arguments and attributes."""

    _instead = _INSTEAD

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
        # Which of the names beyond NAMED_TOKENS the configuration gives, in its order.
        self._named = {name: bool(token) and config.get(name) is not None for name, token in named.items()}
        self._named = {name: given for name, given in self._named.items() if name not in NAMED_TOKENS}
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.config = self.init_kwargs = config
        self.padding_side = self.config.get("padding_side") or "right"
        self.truncation_side = self.config.get("truncation_side") or "right"
        self.model_max_length = self.config.get("model_max_length") or _UNLIMITED
        template = self.config.get("chat_template")
        self.chat_template = template if isinstance(template, str) else named_templates(template) or None
        self._learn_added()
        self.keep_markup = _MARKUP_SIGN in self.added_tokens

    def _learn_added(self) -> None:
        """What follows from the added tokens of the backend."""
        self.added_tokens = {token.content: id for id, token in self.backend.get_added_tokens_decoder().items()}
        self.added_words = frozenset(self.added_tokens)
        self._without: dict[frozenset[str], Tokenizer] = {}
        self.__dict__.pop("plain_backend", None)

    @property
    def vocab_size(self) -> int:
        """Size of the base vocabulary, as transformers counts it; len(tokenizer) counts added tokens as well."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """The whole vocabulary.

        Returns:
            The id of every token, added tokens included.
        """
        return self.backend.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """`get_vocab`."""
        return self.get_vocab()

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens.

        Returns:
            `added_tokens` by ascending ids.
        """
        return dict(sorted(self.added_tokens.items(), key=lambda entry: entry[1]))

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """`get_added_vocab`."""
        return self.get_added_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens, as tokenizers.AddedToken, by id."""
        return self.backend.get_added_tokens_decoder()

    @property
    def is_fast(self) -> bool:
        """True: the tokenizers package does the work."""
        return True

    @property
    def clean_up_tokenization_spaces(self) -> bool:
        """False: `decode` leaves spaces as they are."""
        return False

    def __getattr__(self, name: str) -> Any:
        # eos_token_id, pad_token_id, …: the id of the token attribute of that name
        if name.endswith("_token_id") and name[: -len("_id")] in self.__dict__:
            token = self.__dict__[name[: -len("_id")]]
            return None if token is None else self.convert_tokens_to_ids(token)
        raise no_attribute(self, name, self._instead)

    def __setattr__(self, name: str, value: Any) -> None:
        token = name.removesuffix("_id")
        if name.endswith("_token_id") and (token in NAMED_TOKENS or token in self.__dict__.get("_named", ())):
            name, value = token, None if value is None else self.convert_ids_to_tokens(value)
            if value is None and token not in NAMED_TOKENS:
                raise InputError(f"{token} needs a token of the vocabulary")
        object.__setattr__(self, name, value)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set, by the names of their attributes."""
        return {name: getattr(self, name) for name in NAMED_TOKENS if getattr(self, name) is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens that have names, in the order of transformers, then those that the configuration only lists."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.extra_special_tokens]))

    @property
    def extra_special_tokens(self) -> list[str]:
        """The special tokens that the configuration names or lists beyond NAMED_TOKENS."""
        extra = self.config.get("extra_special_tokens") or self.config.get("additional_special_tokens") or []
        listed = [] if isinstance(extra, dict) else list(map(_content, extra))
        return list(dict.fromkeys([*(getattr(self, name) for name in self._named if self._named[name]), *listed]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`. `decode(skip_special_tokens=True)` leaves out every added token that is special."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add words that are not split. The model has no embeddings for ids beyond its vocabulary.

        Args:
            new_tokens: a string or tokenizers.AddedToken, or a list of them.
            special_tokens: `decode(skip_special_tokens=True)` leaves them out.

        Returns:
            How many of them are new to the vocabulary.

        Raises:
            InputError: one is no token.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str) or not isinstance(new_tokens, (list, tuple)) else list(new_tokens)
        add = self.backend.add_special_tokens if special_tokens else self.backend.add_tokens
        before = len(self)
        guarded("add the tokens", InputError, lambda: add(tokens))
        self._learn_added()
        return len(self) - before

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], replace_extra_special_tokens: bool = True) -> int:
        """Give special tokens their names, and add those that the vocabulary does not have.

        Args:
            special_tokens_dict: tokens by name (bos_token, image_token, …), and under extra_special_tokens a list of others.
            replace_extra_special_tokens: whether that list takes the place of the former one, or is added to it.

        Returns:
            How many of them are new to the vocabulary.

        Raises:
            InputError: a name is none that a token can have, or a token is none.
        """
        tokens: list[Any] = []
        for name, token in special_tokens_dict.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                former = self.config.get("extra_special_tokens")
                kept = [] if replace_extra_special_tokens or not isinstance(former, list) else former
                self.config["extra_special_tokens"] = [*kept, *map(str, map(_bare, token))]
                tokens += token
            elif name in NAMED_TOKENS or name in self._named:
                setattr(self, name, _bare(token))
                self.config[name] = _bare(token)
                tokens.append(token)
            else:
                raise unknown_argument("add_special_tokens", name, [*NAMED_TOKENS, *self._named, "extra_special_tokens"])
        return self.add_tokens(tokens, special_tokens=True) if tokens else 0

    @property
    def control_tokens(self) -> frozenset[str]:
        """The tokens that `decode` leaves out with keep_markup: all added tokens but the markup of a document checkpoint."""
        markup = _MARKUP_SIGN in self.added_tokens
        return frozenset(token for token in self.added_tokens if not markup or _NOT_MARKUP.search(token))

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Tokens to ids.

        Args:
            tokens: one token, or several.

        Returns:
            An id, or a list of ids. An unknown token gets unk_token's id, None without unk_token.
        """
        if isinstance(tokens, str):
            id = self.backend.token_to_id(tokens)
            return self.backend.token_to_id(self.unk_token) if id is None and self.unk_token is not None else id
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens.

        Args:
            tokens: the tokens.

        Returns:
            The text.
        """
        decoder = self.backend.decoder
        return "".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Ids to tokens.

        Args:
            ids: one id, or several (a list or an array).

        Returns:
            A token, or a list of tokens.
        """
        if np.ndim(ids) == 0:
            return self.backend.id_to_token(int(ids))
        return [self.backend.id_to_token(int(id)) for id in ids]


def _bare(token: Any) -> str:
    """The string of a token. Raises InputError for anything that is none."""
    content = getattr(token, "content", token)
    if not isinstance(content, str):
        raise InputError(f"a token is {token!r:.80}; it needs a string or an AddedToken")
    return content


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
