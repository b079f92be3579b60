"""From the files of a checkpoint to a tokenizers.Tokenizer, with the added tokens that transformers finds in them."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError, MissingFileError, SmolVLMError
from ..habits import Neutral
from ..io import read_bytes, read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_LONGEST_TOKEN = 1000  # characters
_MOST_BYTES = 40_000_000  # of tokenizer.json; the largest that are published have 34 MB
CONFIG = "tokenizer_config.json"
# Entries of that file that a call may override; those that end in `_token` name special tokens.
SETTINGS = frozenset({
    *NAMED_TOKENS, "image_token", "fake_image_token", "global_image_token", "video_token", "end_of_utterance_token",
    "padding_side", "truncation_side", "model_max_length", "chat_template", "added_tokens_decoder", "add_prefix_space",
    "additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens",
})  # fmt: skip
# Entries that do nothing for a byte-level BPE, or whose default is what is done.
NEUTRAL = {
    "clean_up_tokenization_spaces": Neutral((False,)),
    "split_special_tokens": Neutral((False,), "pass it to the tokenizer's call"),
    "errors": Neutral(("replace",)),
    "legacy": Neutral((True, False)),
    "from_slow": Neutral((False,)),
    "name_or_path": Neutral(),
    "tokenizer_type": Neutral(),
}


def read_config(directory: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What the small files of a tokenizer say.

    As in transformers, special_tokens_map.json counts only beside a tokenizer_config.json without added_tokens_decoder, where
    it overrides that file.

    Args:
        directory: of the checkpoint.
        overrides: entries that override the files.

    Raises:
        CheckpointError: a file cannot be read, or an entry is not what it should be; the message names both.
    """
    path = os.path.join(directory, CONFIG)
    config = _checked(read_json(path, missing_ok=True), path)
    if "added_tokens_decoder" not in config:
        path = os.path.join(directory, "special_tokens_map.json")
        more = _checked(read_json(path, missing_ok=True), path)
        extra = config.get("extra_special_tokens")
        if isinstance(extra, dict) and ("additional_special_tokens" in more or "extra_special_tokens" in more):
            # Names from one file and a list from the other: both count.
            config["model_specific_special_tokens"] = {**(config.get("model_specific_special_tokens") or {}), **extra}
            del config["extra_special_tokens"]
        config |= more
    return {**config, **overrides}


def _checked(config: dict[str, Any], path: str) -> dict[str, Any]:
    def require(fits: bool, key: str, wants: str) -> None:
        if not fits:
            raise CheckpointError(f"{path}: {key} must be {wants}, got {config[key.partition('.')[0]]!r:.80}")

    for key, value in config.items():
        if value is None:
            continue
        if key in NAMED_TOKENS or (key.endswith("_token") and isinstance(value, dict)):
            require(_is_token(value), key, "a token, a string or an object with its content")
        elif key.endswith("_token"):
            require(not isinstance(value, str) or _is_token(value), key, "a token")
        elif key in ("padding_side", "truncation_side"):
            require(value in ("left", "right"), key, "'left' or 'right'")
        elif key == "model_max_length":
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number and value >= 1, key, "a number of tokens")
        elif key == "chat_template":
            texts = {"default": value} if isinstance(value, str) else named_templates(value)
            require(texts is not None, key, "a text, or texts by name")
        elif key == "added_tokens_decoder":
            require(isinstance(value, dict), key, "an object")
            for id, token in value.items():
                number = id.isdecimal() and len(id) <= 10
                require(number and isinstance(token, dict) and _is_token(token), f"{key}.{id[:20]}", "tokens by id")
        elif key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
            tokens = value.values() if isinstance(value, dict) else value
            require(isinstance(value, (dict, list)) and all(map(_is_token, tokens)), key, "a list of tokens, or tokens by name")
    return config


def named_templates(value: Any) -> dict[str, str] | None:
    """Chat templates by name, from either form that a file may have; None for anything else."""
    if isinstance(value, list) and all(isinstance(item, dict) and {"name", "template"} <= set(item) for item in value):
        value = {item["name"]: item["template"] for item in value if isinstance(item["name"], str)}
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    return None


def _is_token(value: Any) -> bool:
    if isinstance(value, dict):
        flags = all(isinstance(value.get(flag, False), bool) for flag in _FLAGS)
        return flags and isinstance(value.get("content"), str) and _is_token(value["content"])
    return isinstance(value, str) and len(value) <= _LONGEST_TOKEN and not any("\ud800" <= c <= "\udfff" for c in value)


def read_backend(directory: str, config: dict[str, Any], *, pre_tokenizer: str | None = None) -> "Tokenizer":
    """The tokenizer of a directory, with all added tokens that its files name.

    Args:
        directory: has tokenizer.json, or vocab.json and merges.txt.
        config: what `read_config` found.
        pre_tokenizer: see SmolVLMTokenizer.from_pretrained.

    Raises:
        CheckpointError: there is no tokenizer, or its files cannot be read.
        InputError: pre_tokenizer is neither None nor "transformers-5".
    """
    from tokenizers import Tokenizer, pre_tokenizers

    path = os.path.join(directory, "tokenizer.json")
    if os.path.exists(path):
        text = read_bytes(path, limit=_MOST_BYTES)
        backend = guarded(f"read the tokenizer {path!r}", CheckpointError, lambda: Tokenizer.from_buffer(text))
    else:
        backend = _from_vocab(directory, config)
    if pre_tokenizer == "transformers-5":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre_tokenizer is not None:
        raise InputError(f"pre_tokenizer is {pre_tokenizer!r}; it is None or 'transformers-5'")
    guarded(f"add tokens to the tokenizer of {directory!r}", CheckpointError, lambda: _add(backend, directory, config))
    return backend


def _add(backend: "Tokenizer", directory: str, config: Mapping[str, Any]) -> None:
    """Add the tokens of the small files, with the flags and in the order in which transformers adds them."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = {token.content: token for token in _listed(directory, config)}
    # Where the configuration lists added tokens, those of tokenizer.json count only if they are in the list.
    flags = listed if "added_tokens_decoder" in config else {**listed, **known}
    named, extra = _named(config)
    special = [flags.get(_content(token), _as_added(token)) for name, token in named if name in NAMED_TOKENS]
    special += [_as_added(token) for token in [*(token for name, token in named if name not in NAMED_TOKENS), *extra]]
    for token in special:
        if token.content not in known:
            listed.setdefault(token.content, token)
    backend.add_tokens(list(listed.values()))
    backend.add_special_tokens(special)


def guarded(what: str, error: type[SmolVLMError], work: Callable[[], Any]) -> Any:
    """The result of a call into the tokenizers library.

    Args:
        what: what it is for, for the message "cannot WHAT: …".
        error: the exception to raise.
        work: the call.

    Raises:
        SmolVLMError: an `error` for whatever the library raises: bare exceptions, and panics, which are no Exception.
    """
    try:
        return work()
    except BaseException as fault:
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
            raise
        raise error(f"cannot {what}: {' '.join(str(fault).split()):.300}") from fault


def _as_added(token: Any, **defaults: bool) -> "AddedToken":
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, **{"special": True, "normalized": False, **defaults})
    return AddedToken(token["content"], **{**defaults, **{flag: token[flag] for flag in _FLAGS if flag in token}})


def _content(token: Any) -> str:
    return token if isinstance(token, str) else token["content"]


def _named(config: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Special tokens: those that have names in the configuration, with their names, and those without."""
    own = [(name, config.get(name)) for name in NAMED_TOKENS]
    own += [(name, token) for name, token in config.items() if name.endswith("_token") and name not in NAMED_TOKENS]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []  # the older name counts alone
    own += (config.get("model_specific_special_tokens") or {}).items()
    own += extra.items() if isinstance(extra, dict) else []
    named = [(name, token) for name, token in own if isinstance(token, (str, dict)) and token]
    return named, [] if isinstance(extra, dict) else extra


def _listed(directory: str, config: Mapping[str, Any]) -> Iterator["AddedToken"]:
    """Added tokens that the configuration lists, or else added_tokens.json, in the order of their ids."""
    if "added_tokens_decoder" in config:
        for id in sorted(config["added_tokens_decoder"] or {}, key=int):
            yield _as_added(config["added_tokens_decoder"][id])
        return
    path = os.path.join(directory, "added_tokens.json")
    added = read_json(path, missing_ok=True)
    named, extra = _named(config)
    special = {_content(token) for token in [*(token for name, token in named if name in NAMED_TOKENS), *extra]}
    for content, id in added.items():
        if not _is_token(content) or not isinstance(id, int) or isinstance(id, bool):
            raise CheckpointError(f"{path}: {content!r:.80} must have its id, a whole number, got {id!r:.80}")
    for content in sorted(added, key=added.__getitem__):
        yield _as_added({"content": content}, special=content in special, normalized=content not in special)


def _from_vocab(directory: str, config: dict[str, Any]) -> "Tokenizer":
    """A byte-level BPE from vocab.json and merges.txt, as GPT-2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = os.path.join(directory, "vocab.json"), os.path.join(directory, "merges.txt")
    if not (os.path.exists(vocab) and os.path.exists(merges)):
        raise MissingFileError(
            f"no tokenizer in {directory!r}: neither tokenizer.json nor vocab.json with merges.txt; copy them from the "
            "original model, or download the whole repository"
        )
    for path in (vocab, merges):
        read_bytes(path, limit=_MOST_BYTES)
    backend = Tokenizer(guarded(f"read the tokenizer {vocab!r}", CheckpointError, lambda: models.BPE.from_file(vocab, merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    return backend
