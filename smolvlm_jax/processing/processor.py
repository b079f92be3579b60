"""SmolVLMProcessor: text, pictures and videos to what the model reads."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, PromptError
from . import chat, template
from .arguments import ALL, Arguments, joined_arguments, sort_arguments
from .batch import BatchFeature, as_tensors
from .fetch import is_source
from .generations import Marks, marks_for, take_spans, token_mask
from .images import SmolVLMImageProcessor
from .layout import check_order, flatten_videos, nest_images
from .processor_files import ProcessorFiles
from .processor_texts import ProcessorTexts
from .prompts import MEDIA_TOKENS, MediaTokens, expand, media_tokens
from .protect import Escaped, encode_prompt, guard_for, mode_of
from .steering import steering_words
from .text_options import TextOptions, list_of_texts
from .tokenizer import SmolVLMTokenizer
from .videos import SmolVLMVideoProcessor

# A checkpoint without video_sampling (those for still pictures only) still needs a rule to choose the frames of a file.
_FALLBACK_SAMPLING = {"num_frames": 64, "fps": 1}


class _Prompts(NamedTuple):
    """Rendered conversations, how escaped words are kept apart in them, where there are any, and what the assistant says, where
    that is asked for."""

    texts: list[str]
    escaped: Escaped | None
    conversations: chat.Conversations
    marks: Marks | None


class SmolVLMProcessor(ProcessorFiles, ProcessorTexts):
    """An image processor, a video processor, a tokenizer and a chat template that work on one prompt.

    Args:
        image_processor: None takes the defaults of SmolVLMImageProcessor.
        tokenizer: a SmolVLMTokenizer, or a fast tokenizer of transformers.
        video_processor: None takes the defaults of SmolVLMVideoProcessor.
        image_seq_len: image tokens of one tile: 64 for the 256M and 500M, 81 for the 2.2B.
        chat_template: jinja text, or a dictionary of named ones with "default" among them. None takes the tokenizer's,
            or the built-in template where that has none.

    Attributes:
        default_fps: frames per second assumed for videos that come without a rate: 24, as in the reference, which puts
            all timestamps close to 00:00. None refuses such videos.

    Raises:
        InputError: there is no tokenizer, or an argument makes no sense.
    """

    def __init__(
        self,
        image_processor: SmolVLMImageProcessor | None = None,
        tokenizer: SmolVLMTokenizer | None = None,
        video_processor: SmolVLMVideoProcessor | None = None,
        image_seq_len: int = 169,
        chat_template: str | dict[str, str] | None = None,
    ):
        if tokenizer is None:
            raise InputError("SmolVLMProcessor needs a tokenizer")
        if isinstance(image_seq_len, bool) or not isinstance(image_seq_len, int) or image_seq_len < 1:
            raise InputError(f"image_seq_len is {image_seq_len!r}; it needs a positive whole number")
        self.tokenizer = tokenizer = SmolVLMTokenizer.wrap(tokenizer)
        self.image_processor = image_processor or SmolVLMImageProcessor()
        self.video_processor = video_processor or SmolVLMVideoProcessor()
        self.image_seq_len = image_seq_len
        self.chat_template = tokenizer.chat_template if chat_template is None else chat_template
        self.default_fps: float | None = 24
        self.fake_image_token: str = tokenizer.fake_image_token
        self.image_token: str = tokenizer.image_token
        self.end_of_utterance_token: str = tokenizer.end_of_utterance_token
        self.global_image_token: str = tokenizer.global_image_token
        self.video_token: str = tokenizer.video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def media_tokens(self) -> MediaTokens:
        """The strings that the block of a picture or video is made of."""
        tokens = {name: getattr(self, name) for name in MEDIA_TOKENS}
        return media_tokens(self.image_processor.tiling, image_seq_len=self.image_seq_len, **tokens)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the arrays that a call returns."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def steering_words(self, chat_template: str | None = None, *, video: bool = False) -> frozenset[str]:
        """The words that steer the model in a user's text: those that the template writes, and those for media.

        Other added tokens of the tokenizer, special or not, are words.

        Args:
            chat_template: as in `apply_chat_template`.
            video: there is a video in the conversation, so that the default is the template that has videos.

        Returns:
            The words.

        Raises:
            PromptError: the template is not valid.
        """
        jinja = template.choose_template(self.chat_template, chat_template, video=video)
        media = (getattr(self, name) for name in MEDIA_TOKENS)
        always = frozenset({*media, *self.tokenizer.special_tokens_map.values()})
        return steering_words(jinja, self.tokenizer.added_words, always)

    # ---- strings and pixels to arrays

    def __call__(
        self, images: Any = None, text: str | list[str] | None = None, videos: Any = None, **kwargs: Any
    ) -> BatchFeature:
        """Prompts that are strings already, and the pictures or videos that belong to them.

        Args:
            images: a list of pictures for each text; see `SmolVLMImageProcessor.preprocess`.
            text: one prompt or several. Each `<image>` or `<video>` in it is the place of one picture or video. It is taken
                as it is, special tokens included; use `apply_chat_template` for texts that somebody else wrote.
            videos: in the order of the texts; see `SmolVLMVideoProcessor.preprocess`. Not together with pictures.
            **kwargs: return_tensors (None, "np" or "jax"), pixel_format ("float32" or "uint8"), limits (a MediaLimits),
                return_metadata (return `video_metadata`, a VideoMetadata for each video); every keyword of the tokenizer's
                call, and return_mm_token_type_ids (return `mm_token_type_ids`, 1 for image tokens); every argument of the
                calls of the image and video processor. Also dictionaries of such keywords for one part: text_kwargs,
                images_kwargs, videos_kwargs.

        Returns:
            input_ids and attention_mask, lists or as arrays int64 (b, t). With pictures or videos also, for
            pixel_format="float32", pixel_values, float32 (b, n, 3, T, T), and pixel_attention_mask, int64 (b, n, T, T);
            for "uint8" pixel_values, uint8 (N, T, T, 3), and num_tiles = N.

        Raises:
            InputError: pictures and their tokens disagree in number, truncation cuts such tokens, or an argument is unknown.
            MediaError: a file that cannot be read or decoded, or exceeds the limits.
        """
        check_order(images, text, self.image_token)
        return self._process(images, text, videos, sort_arguments(kwargs))

    def _process(
        self,
        images: Any,
        text: Any,
        videos: Any,
        arguments: Arguments,
        escaped: Escaped | None = None,
        marks: Marks | None = None,
    ) -> BatchFeature:
        videos = None if isinstance(videos, (list, tuple)) and not videos else videos
        if images is None and text is None and videos is None:
            raise InputError("nothing to process; pass text, images or videos")
        if images is not None and videos is not None:
            raise InputError("images and videos in one call, which takes one or the other: ask about each in a call of its own")
        texts = None if text is None else list_of_texts(text)
        if texts == []:
            raise InputError("text is an empty list")
        samples = None if images is None else nest_images(images)
        if samples is not None and texts is not None and not any(samples):
            samples = None
        if samples is not None:
            options = _page_options(arguments.images)
            samples = [[page for one in sample for page in self.image_processor.pages_of(one, **options)] for sample in samples]
        clips = None if videos is None else flatten_videos(videos)
        if texts is not None:
            self.media_tokens.check_counts(texts, samples, len(clips or ()))
        data = BatchFeature()
        token, blocks = self.image_token, []
        if samples is not None:
            data = self.image_processor(samples, return_row_col_info=True, **arguments.images)
            grids = (list(zip(*rows_cols, strict=True)) for rows_cols in zip(data.pop("rows"), data.pop("cols"), strict=True))
            blocks = self.media_tokens.pictures(grids)
        elif clips is not None:
            data = self.video_processor(clips, return_metadata=True, **arguments.videos)
            if texts is not None:
                token, blocks = self.video_token, self.media_tokens.videos(data["video_metadata"], self.default_fps)
            if not arguments.return_metadata:
                del data["video_metadata"]
        out = BatchFeature()
        if texts is not None:
            tokenize = self._tokenize if marks is None else functools.partial(self._tokenize_marked, marks)
            out = tokenize(expand(texts, token, blocks), arguments.text, escaped)
        out.update(data)
        return out

    def _tokenize(self, texts: list[str], keywords: dict[str, Any], escaped: Escaped | None) -> BatchFeature:
        options = TextOptions.of(type(self).__name__, keywords)
        if escaped is None or not any(escaped.mark in text for text in texts):
            columns = self.tokenizer.columns_of(texts, options)
        elif options.return_special_tokens_mask or options.return_offsets_mapping:
            raise InputError("special_tokens_in_text='escape' with a text to escape leaves no offsets and masks of tokens")
        else:
            add = bool(options.add_special_tokens)
            rows = [encode_prompt(self.tokenizer, t, escaped=escaped, add_special_tokens=add) for t in texts]
            columns = {"input_ids": rows}
        if options.return_mm_token_type_ids:
            columns["mm_token_type_ids"] = [[int(id == self.image_token_id) for id in row] for row in columns["input_ids"]]
        batch = self.tokenizer.batch_of(columns, options)
        kept_ids = [np.asarray(row).tolist() for row in batch["input_ids"]]
        for index, (row, text, kept) in enumerate(zip(columns["input_ids"], texts, kept_ids, strict=True)):
            wanted, left = text.count(self.image_token), kept.count(self.image_token_id)
            if wanted != left:
                raise InputError(
                    f"text {index} takes {len(row)} tokens, and truncation leaves {left} of its {wanted} image tokens; "
                    f"pass max_length={len(row)} or more, or fewer tiles (max_tiles)"
                )
        return batch

    def _tokenize_marked(
        self, marks: Marks, texts: list[str], keywords: dict[str, Any], escaped: Escaped | None
    ) -> BatchFeature:
        """`_tokenize`, with `assistant_masks`."""
        pairs = [take_spans(text, marks) for text in texts]
        batch = self._tokenize([text for text, _ in pairs], {**keywords, "return_offsets_mapping": True}, escaped)
        offsets = batch["offset_mapping"]
        masks = [token_mask(np.asarray(row).tolist(), spans) for row, (_, spans) in zip(offsets, pairs, strict=True)]
        batch |= as_tensors({"assistant_masks": masks}, keywords.get("return_tensors"))
        if not keywords.get("return_offsets_mapping"):
            del batch["offset_mapping"]
        return batch

    # ---- conversations

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        special_tokens_in_text: str | None = None,
        sanitize_control_tokens: bool = False,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """A conversation, or a list of them, to prompts or to what the model reads.

        Args:
            conversation: messages {"role", "content"}; content is a string or a list of items {"type": "text", "text"},
                {"type": "image", "image" | "url" | "path" | "base64"} and {"type": "video", "video" | "url" | "path"}.
            chat_template: jinja text, or the name of one of the processor's templates; None takes the default.
            tools: a variable of the template.
            documents: a variable of the template.
            add_generation_prompt: end with "Assistant:", so that the model answers.
            continue_final_message: end right after the last text, so that the model goes on with it.
            tokenize: return ids, or what the model reads, instead of the prompt string.
            return_tensors: "np" or "jax" for arrays, None for lists.
            return_dict: with tokenize, return what `__call__` returns instead of input_ids alone.
            processor_kwargs: keywords of `__call__`.
            special_tokens_in_text: what to do with a text that holds a word that steers the model, such as `<image>` or
                `<end_of_utterance>` (see `steering_words`). "error"
                (the default) refuses it, "escape" has it read as plain characters (needs tokenize=True), "allow" lets it
                steer the model.
            sanitize_control_tokens: transformers' name for special_tokens_in_text="escape".
            return_assistant_tokens_mask: with return_dict, return `assistant_masks` too, 1 for tokens that the template writes
                between {% generation %} and {% endgeneration %}. A template without these gives zeros, and a warning.
            **kwargs: keywords of `__call__` (frames of videos are sampled unless do_sample_frames=False), or variables of the
                template.

        Returns:
            The prompt, a string (a list of them for a list of conversations); with tokenize input_ids, or with return_dict
            what `__call__` returns.

        Raises:
            PromptError: the conversation or the template is not valid, or a text holds a special token.
            InputError: neither the processor nor the template knows a keyword, or what `__call__` raises.
            MediaError: a file that cannot be read or decoded, or exceeds the limits.
        """
        if return_assistant_tokens_mask and not (tokenize and return_dict):
            raise InputError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        own = {name: kwargs.pop(name) for name in list(kwargs) if name in ALL}
        call = joined_arguments({**own, "return_tensors": return_tensors}, processor_kwargs)
        texts, escaped, conversations, marks = self._prompts(
            conversation,
            chat_template,
            {"tools": tools, "documents": documents, **kwargs},
            mode=mode_of(special_tokens_in_text, sanitize_control_tokens),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            pages=_page_options(call),
            generations=return_assistant_tokens_mask,
        )
        if not tokenize:
            if escaped is not None:
                raise PromptError("special_tokens_in_text='escape' needs tokenize=True: a string has no escaped form")
            return texts if conversations.batched else texts[0]
        images, videos = (chat.collect_media(conversations.messages, kind) for kind in ("image", "video"))
        given = call.pop("images", None)
        if given is None:
            given = images if any(images) else None
        elif any(images):
            raise InputError("pictures are given twice, as images and in the messages; leave one of them out")
        arguments = sort_arguments(call)
        arguments.videos.update(self._sampling_defaults(arguments.videos, videos))
        if self.tokenizer.bos_token and texts[0].startswith(self.tokenizer.bos_token):
            arguments.text.setdefault("add_special_tokens", False)
        clips = videos if any(videos) else None
        out = self._process(given, texts, clips, arguments, escaped, marks)
        return out if return_dict else out["input_ids"]

    def encode_chat(self, conversation: Any, *, add_generation_prompt: bool = True, **kwargs: Any) -> BatchFeature:
        """A conversation, or a list of them, as the arrays that our models run on, with tiles in uint8.

        Args:
            conversation: as in `apply_chat_template`.
            add_generation_prompt: end with "Assistant:", so that the model answers.
            **kwargs: other keywords of `apply_chat_template`.

        Returns:
            What `__call__` returns for `return_tensors="np", pixel_format="uint8"`.

        Raises:
            InputError: as `apply_chat_template` raises it, like the others.
            MediaError: a file that cannot be read or decoded.
            PromptError: the conversation or the template is not valid.
        """
        fixed: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "np", "pixel_format": "uint8"}
        return self.apply_chat_template(conversation, add_generation_prompt=add_generation_prompt, **fixed, **kwargs)

    def _sampling_defaults(self, given: Mapping[str, Any], videos: list[list]) -> dict[str, Any]:
        """What the video processor is asked for beyond the keywords `given`: frames are sampled unless they say otherwise."""
        if "do_sample_frames" in given:
            return {}
        # Frames that come without a rate were chosen when the list was made.
        sampled = {"do_sample_frames": True, "sample_lists": False}
        if given.get("num_frames") is None and given.get("fps") is None and self.video_processor.num_frames is None:
            files = any(is_source(clip) for sample in videos for clip in sample)
            return {**_FALLBACK_SAMPLING, **sampled} if files else {}
        return sampled

    def _prompts(
        self,
        conversation: Any,
        chat_template: str | None,
        variables: dict[str, Any],
        *,
        mode: str,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        pages: Mapping[str, Any],
        generations: bool = False,
    ) -> _Prompts:
        conversations = chat.normalize_conversations(conversation)
        chat.expand_images(conversations.messages, lambda picture: self.image_processor.pages_of(picture, **pages))
        video = chat.has_video(conversations.messages)
        jinja = template.choose_template(self.chat_template, chat_template, video=video)
        read = template.variables_of(jinja)
        unused = sorted(name for name in set(variables) - read if variables[name] or name not in ("tools", "documents"))
        if unused:
            raise PromptError(f"neither the processor nor the chat template has a use for the argument {unused[0]!r}")
        if "{" not in jinja:
            raise PromptError(f"no chat template is called {jinja[:80]!r}, and as a template it would drop all messages")
        chat.refuse_unused_keys(conversations.messages, jinja)
        words = self.steering_words(jinja)
        guard = guard_for(words, self.tokenizer)
        marks = marks_for(jinja, conversations.messages, variables) if generations else None
        shown = {**template.plain(variables), **(marks.variables if marks else {})}
        guarded = guard.apply(conversations.messages, shown, mode)
        mark = guarded.mark
        texts = template.render(
            jinja,
            guarded.conversations,
            strings=conversations.strings,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**self.tokenizer.special_tokens_map, **guarded.variables},
        )
        if mark is not None and mode == "error":
            texts, mark = guard.unmark(texts, mark), None
        return _Prompts(texts, None if mark is None else Escaped(mark, words), conversations, marks)

    # ---- counting without decoding

    def count_tokens(self, width: int, height: int, **images_kwargs: Any) -> int:
        """Image tokens of a picture of a given size: tiles × image_seq_len. No pixel is needed.

        The markers around the tiles are not counted; `count_prompt_tokens` counts whole prompts.

        Args:
            width: in pixels.
            height: in pixels.
            **images_kwargs: arguments of the image processor, for this call.

        Returns:
            The number of image tokens.
        """
        return self.image_processor.plan(height, width, **images_kwargs).num_tiles * self.image_seq_len

    def count_prompt_tokens(
        self,
        conversation: Any,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        special_tokens_in_text: str | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Length in tokens of the prompts that `apply_chat_template` would make, from the headers of their pictures.

        No pixel is decoded. Conversations with videos are refused, since a video has to be opened to know its frames.

        Args:
            conversation: one conversation or a list of them, as in `apply_chat_template`.
            chat_template, add_generation_prompt, special_tokens_in_text: as there.
            **kwargs: arguments of the image processor, and variables of the template.

        Returns:
            A number for each conversation.

        Raises:
            InputError: a conversation has a video, or what `apply_chat_template` raises.
            PromptError: the conversation or the template is not valid.
        """
        call = {name: kwargs.pop(name) for name in list(kwargs) if name in ALL}
        options = {k: v for k, v in sort_arguments(call).images.items() if k in self.image_processor.DEFAULTS}
        prompts = self._prompts(
            conversation,
            chat_template,
            kwargs,
            mode=special_tokens_in_text or "error",
            add_generation_prompt=add_generation_prompt,
            pages=_page_options(call),
        )
        messages = prompts.conversations.messages
        if chat.has_video(messages):
            raise InputError("count_prompt_tokens counts pictures only; a video has to be opened to know its frames")
        samples = chat.collect_media(messages, "image")
        self.media_tokens.check_counts(prompts.texts, samples, 0)
        plans = ([self.image_processor.plan_picture(picture, **options) for picture in sample] for sample in samples)
        blocks = self.media_tokens.pictures([(plan.rows, plan.cols) for plan in sample] for sample in plans)
        texts = expand(prompts.texts, self.image_token, blocks)
        return [len(encode_prompt(self.tokenizer, t, escaped=prompts.escaped, add_special_tokens=False)) for t in texts]


def _page_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the keywords of a call those that `pages_of` needs."""
    options = {**(given.get("images_kwargs") or {}), **given}
    return {name: options[name] for name in ("pages", "limits") if options.get(name) is not None}
