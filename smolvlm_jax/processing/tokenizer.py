"""SmolVLMTokenizer: a tokenizer.json behind the names that code for transformers uses."""

import functools
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..habits import Neutral, unasked
from ..io import write_json, write_text
from ..locate import find_directory
from .batch import BatchFeature, as_tensors
from .choices import one_of
from .prompts import MEDIA_TOKENS
from .text_options import TextOptions, list_of_texts, make_batch, plain_rows
from .tokenizer_files import NAMED_TOKENS, NEUTRAL, SETTINGS, guarded, read_backend, read_config
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_DECODING = {"clean_up_tokenization_spaces": Neutral((False,)), "spaces_between_special_tokens": Neutral((True, False))}


class SmolVLMTokenizer(Vocabulary):
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

    Raises:
        CheckpointError: the configuration gives a special token the name of a method.
    """

    model_input_names = ("input_ids", "attention_mask")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *, pre_tokenizer: str | None = None, **kwargs: Any
    ) -> "SmolVLMTokenizer":
        """The tokenizer of a checkpoint.

        Args:
            pretrained_model_name_or_path: what `load` takes: a directory with tokenizer.json (or vocab.json and merges.txt)
                and, where present, tokenizer_config.json, special_tokens_map.json and added_tokens.json, the name of a bundled
                checkpoint, or a Hub id; or one of these files.
            pre_tokenizer: "transformers-5" splits text as transformers 5 does, for comparisons: it reads the published
                checkpoints as GPT-2 tokenizers and drops the split into single digits that their tokenizer.json asks
                for, so that "\\n\\n1" gets other ids than the models were trained on. None keeps to the file.
            **kwargs: entries of tokenizer_config.json that override the file; also revision, subfolder, cache_dir,
                force_download, local_files_only and token.

        Returns:
            The tokenizer.

        Raises:
            CheckpointError: there is no such checkpoint or no tokenizer, or its files cannot be read.
            InputError: an unknown keyword, or pre_tokenizer is neither None nor "transformers-5".
        """
        where = f"{cls.__name__}.from_pretrained"
        named = {name for name in kwargs if name.endswith("_token") and name != "token"}
        path, kwargs = find_directory(where, pretrained_model_name_or_path, kwargs, frozenset({*SETTINGS, *NEUTRAL, *named}))
        for name in ("padding_side", "truncation_side"):
            if kwargs.get(name) is not None:
                one_of(name, kwargs[name], ("left", "right"))
        directory = str(path.parent if path.is_file() else path)
        config = read_config(directory, unasked(where, kwargs, NEUTRAL, {*SETTINGS, *named}))
        return cls(read_backend(directory, config, pre_tokenizer=pre_tokenizer), config)

    @classmethod
    def wrap(cls, tokenizer: Any) -> "SmolVLMTokenizer":
        """A tokenizer of ours from one of either kind.

        Args:
            tokenizer: a SmolVLMTokenizer, or a fast tokenizer of transformers.

        Returns:
            The former as it is, or a new one around the latter.

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
        """Write tokenizer.json and tokenizer_config.json.

        Args:
            save_directory: where to; it is made if need be.

        Returns:
            The paths of the files written.
        """
        return [
            write_text(os.path.join(save_directory, "tokenizer.json"), self.backend.to_str(pretty=True)),
            write_json(os.path.join(save_directory, "tokenizer_config.json"), self.config, sort_keys=True),
        ]

    # ---- to ids

    def encode(
        self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False, **kwargs: Any
    ) -> list[int]:
        """The ids of one text.

        Args:
            text: the text.
            add_special_tokens: add what tokenizer.json puts around every text.
            split_special_tokens: read special tokens in the text as the characters they are.
            **kwargs: as in the call.

        Returns:
            A list of ids; with return_tensors an array (1, t).

        Raises:
            InputError: the text is no string, or holds half of a surrogate pair.
        """
        if kwargs:
            options = {"add_special_tokens": add_special_tokens, "split_special_tokens": split_special_tokens, **kwargs}
            return self(text, **options)["input_ids"]
        return _encoding(self.plain_backend if split_special_tokens else self.backend, text, add_special_tokens).ids

    def encoding(self, text: str, add_special_tokens: bool = True) -> "Encoding":
        """As `encode`, with the offsets of each token.

        Args:
            text: the text.
            add_special_tokens: as there.

        Returns:
            ids, tokens, offsets and so on.

        Raises:
            InputError: as there.
        """
        return _encoding(self.backend, text, add_special_tokens)

    def encode_without(self, words: frozenset[str], text: str) -> list[int]:
        """The ids of a text for a tokenizer that lacks some added tokens.

        Args:
            words: the added tokens that it lacks.
            text: the text.

        Returns:
            Ids of this tokenizer.

        Raises:
            InputError: as `encode` raises it.
        """
        if words not in self._without:
            from tokenizers import Tokenizer

            description = json.loads(self.backend.to_str())
            description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in words]
            self._without[words] = Tokenizer.from_str(json.dumps(description))
        # By their names, since the other tokenizer numbers the tokens that are left anew.
        other: Any = self._without[words]
        return [self.convert_tokens_to_ids(other.id_to_token(id)) for id in _encoding(other, text, False).ids]

    def normalized(self, text: str) -> str:
        """A text as it is when added tokens with the flag `normalized` are looked for in it.

        Args:
            text: the text.

        Returns:
            The normalised text.

        Raises:
            InputError: the normaliser fails.
        """
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
        """Where an added token was found in a text, with the spaces that it takes along (lstrip, rstrip).

        Args:
            id: of the token.
            text: the text.
            start: first character of the token.
            stop: the character behind it.

        Returns:
            The same with the spaces.
        """
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
        """The tokens of one text.

        Args:
            text: the text.

        Returns:
            The tokens as strings.

        Raises:
            InputError: as `encode` raises it.
        """
        return self.convert_ids_to_tokens(self.encode(text))

    def __call__(self, text: str | list[str], text_pair: None = None, **kwargs: Any) -> BatchFeature:
        """The ids of a text or a list of texts.

        Args:
            text: one text, or a list of them.
            text_pair: None; there are no pairs.
            **kwargs: keywords under the names of transformers, None for a default:
                add_special_tokens (True): add what tokenizer.json puts around every text. split_special_tokens (False): read
                special tokens in a text as the characters they are. padding (False): True or "longest" pads to the longest
                row, "max_length" to max_length. truncation (False): cut rows above max_length on truncation_side.
                max_length (model_max_length): in tokens; alone it cuts rows too.
                pad_to_multiple_of (None): round the padded length up to a multiple.
                padding_side (this tokenizer's). return_attention_mask (True). return_special_tokens_mask (False): 1 for
                padding and what was put around the text. return_offsets_mapping (False): the characters (start, stop) of each
                token. return_length (False). return_tensors (None): "np" or "jax" for arrays, None for lists.

        Returns:
            input_ids and attention_mask (1 for real tokens), int64 (b, t) as arrays; otherwise lists, for one text without the
            outer list. On request also special_tokens_mask, offset_mapping (b, t, 2) and length.

        Raises:
            InputError: the text is no string and no list of strings, rows of unequal length are to become an array, there is
                no pad_token to pad with, an unknown keyword, or one that makes no sense.
        """
        options = TextOptions.of(type(self).__name__, {"text_pair": text_pair, **kwargs})
        if options.return_mm_token_type_ids:
            raise InputError("return_mm_token_type_ids is the processor's: a tokenizer does not know the model's media tokens")
        batch = self.batch_of(self.columns_of(list_of_texts(text), options), options)
        if isinstance(text, str) and options.return_tensors is None:
            # a list of one number stays one, as in transformers
            return BatchFeature({name: value[0] if isinstance(value[0], list) else value for name, value in batch.items()})
        return batch

    def columns_of(self, texts: list[str], options: TextOptions) -> dict[str, list]:
        """The ids of each text, and what describes them.

        Args:
            texts: the texts.
            options: of the call.

        Returns:
            input_ids and what was asked for besides, a list for each text.

        Raises:
            InputError: as `encode` raises it.
        """
        backend = self.plain_backend if options.split_special_tokens else self.backend
        found = [_encoding(backend, text, bool(options.add_special_tokens)) for text in texts]
        columns: dict[str, list] = {"input_ids": [encoding.ids for encoding in found]}
        if options.return_special_tokens_mask:
            columns["special_tokens_mask"] = [encoding.special_tokens_mask for encoding in found]
        if options.return_offsets_mapping:
            columns["offset_mapping"] = [encoding.offsets for encoding in found]
        return columns

    def batch_of(self, columns: dict[str, list], options: TextOptions) -> BatchFeature:
        """`text_options.make_batch` with the settings of this tokenizer.

        Args:
            columns: as `columns_of` returns them.
            options: of the call.

        Returns:
            Cut, padded, and as arrays where that is asked for.
        """
        return make_batch(
            columns,
            options,
            pad_token_id=self.pad_token_id,
            padding_side=self.padding_side,
            truncation_side=self.truncation_side,
            model_max_length=self.model_max_length,
        )

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchFeature:
        """Encoded texts, padded to one length.

        Args:
            encoded_inputs: what the call returns, for one text or several; or a list of such mappings, one for each text.
            padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask, return_tensors: as in the call.
            verbose: without effect.

        Returns:
            The same entries, padded. Those that do not describe tokens (labels, for example) are left as they are.

        Raises:
            InputError: there is no input_ids among them, or what the call raises.
        """
        if isinstance(encoded_inputs, (list, tuple)):
            if not all(isinstance(entry, Mapping) for entry in encoded_inputs):
                raise InputError("pad takes what the tokenizer's call returns, or a list of such mappings with 'input_ids'")
            encoded_inputs = {name: [entry[name] for entry in encoded_inputs] for name in (encoded_inputs or [{}])[0]}
        if not isinstance(encoded_inputs, Mapping) or "input_ids" not in encoded_inputs:
            raise InputError("pad needs a mapping with 'input_ids', as the tokenizer's call returns it")
        columns = {name: plain_rows(value) for name, value in encoded_inputs.items()}
        single = bool(columns["input_ids"]) and not isinstance(columns["input_ids"][0], list)
        options = TextOptions(
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_tensors=None if single else return_tensors,
        )
        if not single:
            return self.batch_of(columns, options)
        batch = self.batch_of({name: [value] for name, value in columns.items()}, options)
        return as_tensors({name: value[0] for name, value in batch.items()}, return_tensors)

    # ---- to text

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, keep_markup: bool | None = None, **kwargs: Any
    ) -> str | list[str]:
        """The text of ids.

        Args:
            token_ids: one id, one row of ids, or several rows (lists or arrays, of any lengths).
            skip_special_tokens: leave special tokens out.
            keep_markup: leave the control tokens out only, so that the markup of a document checkpoint stays. None takes
                this tokenizer's keep_markup, which is True where it knows <doctag>.
            **kwargs: clean_up_tokenization_spaces=False, which is what is done.

        Returns:
            A string, or a list of strings for several rows.

        Raises:
            InputError: an id is negative (−100 of labels, for example), does not fit 32 bits, or is no whole number.
        """
        unasked("decode", kwargs, _DECODING, ("skip_special_tokens", "keep_markup"))
        rows = plain_rows(token_ids)
        if isinstance(rows, list) and rows and isinstance(rows[0], list):
            return [self._decode_row(row, skip_special_tokens, keep_markup) for row in rows]
        return self._decode_row(rows, skip_special_tokens, keep_markup)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, keep_markup: bool | None = None, **kwargs: Any
    ) -> list[str]:
        """`decode` for each row.

        Args:
            sequences: rows of ids; ids that are in no row are one row.
            skip_special_tokens: as in `decode`.
            keep_markup: likewise.
            **kwargs: likewise.

        Returns:
            A text for each row.

        Raises:
            InputError: as there.
        """
        unasked("batch_decode", kwargs, _DECODING, ("skip_special_tokens", "keep_markup"))
        rows = plain_rows(sequences)
        if not isinstance(rows, list) or (rows and not isinstance(rows[0], list)):
            rows = [rows]
        return [self._decode_row(row, skip_special_tokens, keep_markup) for row in rows]

    def _decode_row(self, row: Any, skip_special_tokens: bool, keep_markup: bool | None) -> str:
        ids = row if isinstance(row, list) else [row]
        for id in ids:
            if isinstance(id, bool) or not isinstance(id, int) or id < 0 or id >= 2**32:
                raise InputError(f"cannot decode the id {id!r:.80}")
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
