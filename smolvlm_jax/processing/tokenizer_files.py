"""From the files of a checkpoint to a tokenizers.Tokenizer."""

import os
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, InputError
from ..io import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def read_backend(directory: str, config: dict[str, Any], *, pre_tokenizer: str | None = None) -> "Tokenizer":
    """The tokenizer of a directory, with all added tokens that its files name.

    Args:
        directory: has tokenizer.json, or vocab.json and merges.txt.
        config: what tokenizer_config.json says.
        pre_tokenizer: see SmolVLMTokenizer.from_pretrained.

    Raises:
        CheckpointError: there is no tokenizer, or its files cannot be read.
        InputError: pre_tokenizer is neither None nor "transformers-5".
    """
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers

    path = os.path.join(directory, "tokenizer.json")
    decoder = config.get("added_tokens_decoder", {})
    listed = [(int(id), token) for id, token in sorted(decoder.items(), key=lambda item: int(item[0]))]
    try:
        backend = Tokenizer.from_file(path) if os.path.exists(path) else _from_vocab(directory, config, listed)
    except CheckpointError:
        raise
    except Exception as error:  # the backend raises a bare Exception for whatever is wrong with the file
        raise CheckpointError(f"cannot read the tokenizer {path!r}: {error}") from error
    if pre_tokenizer == "transformers-5":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre_tokenizer is not None:
        raise InputError(f"pre_tokenizer is {pre_tokenizer!r}; it is None or 'transformers-5'")
    added = read_json(os.path.join(directory, "added_tokens.json"), missing_ok=True)
    known = backend.get_vocab(with_added_tokens=True)
    wanted = {token["content"]: token for _, token in listed}
    for content in sorted(added, key=added.__getitem__):
        wanted.setdefault(content, {})
    missing = [content for content in wanted if content not in known]
    backend.add_special_tokens([AddedToken(c, **{flag: wanted[c].get(flag, False) for flag in _FLAGS}) for c in missing])
    return backend


def _from_vocab(directory: str, config: dict[str, Any], listed: list[tuple[int, dict[str, Any]]]) -> "Tokenizer":
    """A byte-level BPE from vocab.json and merges.txt, as GPT-2 has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab, merges = os.path.join(directory, "vocab.json"), os.path.join(directory, "merges.txt")
    if not (os.path.exists(vocab) and os.path.exists(merges)):
        raise CheckpointError(f"no tokenizer in {directory!r}: neither tokenizer.json nor vocab.json with merges.txt")
    backend = Tokenizer(models.BPE.from_file(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    known = [token["content"] for id, token in listed if backend.token_to_id(token["content"]) == id]
    backend.add_special_tokens([AddedToken(content, normalized=False) for content in known])
    return backend
