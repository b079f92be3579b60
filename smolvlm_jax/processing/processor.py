"""SmolVLMProcessor: text, pictures and videos to what the model reads."""

import functools
import logging
import os
import re

from ..errors import InputError, PromptError
from . import chat, checkpoint_files
from .arguments import ALL, sort_arguments
from .assemble import check_return_tensors
from .batch import BatchFeature
from .fetch import image_size
from .images import SmolVLMImageProcessor
from .layout import nest_images
from .limits import MediaLimits
from .prompts import MediaTokens
from .protect import Guard, encode_marked
from .tokenizer import SmolVLMTokenizer
from .videos import SmolVLMVideoProcessor, flatten_videos

_log = logging.getLogger(__name__)
# A checkpoint without video_sampling (the still-picture ones) still has to choose frames of a file somehow.
_FALLBACK_SAMPLING = {"num_frames": 64, "fps": 1}


class SmolVLMProcessor:
    """An image processor, a video processor, a tokenizer and a chat template, working on one prompt.

    image_processor, tokenizer, video_processor: as their classes. image_seq_len: image tokens per tile (64 for the
    256M and 500M, 81 for the 2.2B). chat_template: jinja text, or a dict of named ones with "default" among them;
    where it is None the tokenizer's own serves, then the built-in one.

    default_fps is the rate assumed for videos that come without one, 24 as in the reference (all timestamps are then
    close to 00:00); set it to None to have such videos refused.
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
        tokenizer = SmolVLMTokenizer.wrap(tokenizer)
        if isinstance(image_seq_len, bool) or not isinstance(image_seq_len, int) or image_seq_len < 1:
            raise InputError(f"image_seq_len is {image_seq_len!r}; it needs a positive whole number")
        self.image_processor = image_processor or SmolVLMImageProcessor()
        self.tokenizer = tokenizer
        self.video_processor = video_processor or SmolVLMVideoProcessor()
        self.image_seq_len = image_seq_len
        self.chat_template = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)
        self.default_fps = 24
        self.fake_image_token = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.image_token = getattr(tokenizer, "image_token", "<image>")
        self.end_of_utterance_token = getattr(tokenizer, "end_of_utterance_token", "<end_of_utterance>")
        self.global_image_token = getattr(tokenizer, "global_image_token", "<global-img>")
        self.video_token = getattr(tokenizer, "video_token", "<video>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "SmolVLMProcessor":
        """From the directory of a checkpoint: v4 files, v5's nested processor_config.json, or defaults for what is
        missing; only a tokenizer has to be there.

        Keywords override what the files say: image_seq_len and chat_template here, every other in the image and video
        processors that know it. Raises CheckpointError for files that are missing or broken, InputError for a keyword
        that nobody knows.
        """
        return cls(**checkpoint_files.load_parts(pretrained_model_name_or_path, kwargs))

    def save_pretrained(self, save_directory) -> list[str]:
        """Write everything in the v5 form and return the paths: processor_config.json, chat_template.jinja and the
        tokenizer's files. `from_pretrained` of the directory gives an equal processor."""
        return checkpoint_files.save_parts(self, save_directory)

    def to_dict(self) -> dict:
        """What processor_config.json holds."""
        return {
            "image_processor": self.image_processor.to_dict(),
            "video_processor": self.video_processor.to_dict(),
            "image_seq_len": self.image_seq_len,
            "processor_class": type(self).__name__,
        }

    @property
    def media_tokens(self) -> MediaTokens:
        """The strings a picture's or video's block is made of."""
        return MediaTokens(self.image_seq_len, self.fake_image_token, self.image_token, self.global_image_token)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    # ---- strings and pixels to arrays

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        videos=None,
        *,
        return_tensors: str | None = None,
        return_metadata: bool = False,
        pixel_format: str = "float32",
        limits: MediaLimits | None = None,
        text_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        videos_kwargs: dict | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prompts that are already strings, and the pixels that belong to them.

        text: each `<image>` or `<video>` in it is the place of one picture or video; it is taken as it stands, special
        tokens and all (apply_chat_template is the way for words that somebody else wrote). images: see
        layout.nest_images, a list per text. videos: see videos.flatten_videos, in the order of the texts.
        Keywords: padding, truncation, max_length, pad_to_multiple_of, padding_side, add_special_tokens and every
        argument of the image or video processor, plain or in text_kwargs, images_kwargs, videos_kwargs.

        Returns input_ids and attention_mask, lists or for return_tensors="np" int64 (b, t); then, where there are
        pictures or videos, with pixel_format="float32" pixel_values float32 (b, n, 3, T, T) and pixel_attention_mask
        int64 (b, n, T, T), with "uint8" pixel_values uint8 (N, T, T, 3) and num_tiles.
        Raises InputError where counts disagree or truncation would cut a picture's tokens, MediaError for media.
        """
        check_return_tensors(return_tensors)
        options = sort_arguments(kwargs, text_kwargs, images_kwargs, videos_kwargs)
        media = {"return_tensors": return_tensors, "pixel_format": pixel_format, "limits": limits}
        return self._process(images, text, videos, *options, media, return_metadata, None)

    def _process(self, images, text, videos, text_options, image_options, video_options, media, return_metadata, mark):
        if images is None and text is None and videos is None:
            raise InputError("nothing to process; pass text, images or videos")
        if images is not None and videos is not None:
            raise InputError("images and videos in one call; a batch holds one or the other, so make two of it")
        texts = _list_of_texts(text)
        samples = None if images is None else nest_images(images)
        if samples is not None and texts is not None and not any(samples):
            samples = None
        clips = None if videos is None else flatten_videos(videos)
        if texts is not None:
            self._check_counts(texts, samples, clips)
        data, metadata = BatchFeature(), None
        if samples is not None:
            data = self.image_processor(samples, return_row_col_info=True, **media, **image_options)
            grids = zip(_flat(data.pop("rows")), _flat(data.pop("cols")), strict=True)
            texts = _expand(texts, self.image_token, (self.media_tokens.picture(*grid) for grid in grids))
        elif clips is not None:
            data = self.video_processor(clips, return_metadata=True, **media, **video_options)
            metadata = data.pop("video_metadata")
            if texts is not None:
                texts = _expand(texts, self.video_token, self._video_blocks(metadata))
        out = BatchFeature()
        if texts is not None:
            out = self._tokenize(texts, text_options, media["return_tensors"], mark)
        out.update(data)
        if return_metadata and metadata is not None:
            out["video_metadata"] = metadata
        return out

    def _check_counts(self, texts, samples, clips):
        slots = [text.count(self.image_token) for text in texts]
        if samples is None and any(slots):
            raise InputError(f"{self.image_token} occurs {sum(slots)} times in the texts, but no images were passed")
        if samples is not None:
            given = [len(sample) for sample in samples]
            if slots != given:
                raise InputError(
                    f"{self.image_token} occurs {_shorten(slots)} times in the texts, but they come with "
                    f"{_shorten(given)} images; the counts have to agree text by text (a flat list is one text's)"
                )
        wanted, given = sum(text.count(self.video_token) for text in texts), len(clips or ())
        if wanted != given:
            raise InputError(f"{self.video_token} occurs {wanted} times in the texts, but {given} videos were passed")

    def _video_blocks(self, metadata) -> list[str]:
        for number, clip in enumerate(metadata):
            if clip.frames_indices is None:
                raise InputError(f"videos[{number}]: its frames have no times; pass frames_indices in its video_metadata")
        # The count in words includes padding frames, as the reference writes it.
        most = max(len(clip.frames_indices) for clip in metadata)
        blocks = []
        for clip in metadata:
            if clip.fps is None:
                if self.default_fps is None:
                    raise InputError("a video without fps has no timestamps; pass video_metadata with its fps")
                _log.warning("a video without fps: its timestamps assume %s frames a second", self.default_fps)
                clip.fps = self.default_fps
            blocks.append(self.media_tokens.video(most, clip.timestamps, clip.duration))
        return blocks

    def _encode(self, text: str, add_special_tokens: bool, mark: str | None) -> list[int]:
        if mark is not None and mark in text:
            return encode_marked(self.tokenizer, text, mark)
        return self.tokenizer.encode(text, add_special_tokens)

    def _tokenize(self, texts: list[str], options: dict, return_tensors, mark) -> BatchFeature:
        options = dict(options)
        add_special_tokens = options.pop("add_special_tokens", True)
        rows = [self._encode(text, add_special_tokens, mark) for text in texts]
        batch = self.tokenizer.pad(rows, return_tensors=return_tensors, **options)
        for index, (row, text, kept) in enumerate(zip(rows, texts, batch["input_ids"], strict=True)):
            wanted, left = text.count(self.image_token), list(kept).count(self.image_token_id)
            if wanted != left:
                raise InputError(
                    f"text {index} takes {len(row)} tokens, and truncation leaves {left} of its {wanted} image tokens; "
                    f"pass max_length={len(row)} or more, or fewer tiles (max_tiles)"
                )
        return batch

    # ---- conversations

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools: list[dict] | None = None,
        documents: list[dict] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        special_tokens_in_text: str | None = None,
        sanitize_control_tokens: bool = False,
        **kwargs,
    ):
        """A conversation, or a list of them, to prompts or to what the model reads.

        conversation: messages {"role", "content"}; content is a string or a list of items {"type": "text", "text"},
        {"type": "image", "image" | "url" | "path" | "base64"} and {"type": "video", "video" | "url" | "path"}.
        chat_template: jinja text, or the name of one of several. tokenize: False returns the prompt string (a list
        for a batch), True its ids, or with return_dict what __call__ returns. continue_final_message: stop right
        after the last text. processor_kwargs, and any keyword of __call__: passed on to it; every other keyword is a
        variable of the template. Frames of videos are sampled unless do_sample_frames=False.

        special_tokens_in_text: what to do with a text that holds `<image>`, `<end_of_utterance>` or the like. "error"
        (the default) refuses it, "escape" has it read as plain characters (needs tokenize=True; transformers calls
        this sanitize_control_tokens=True), "allow" lets it steer the model.
        Raises PromptError for conversations and templates, and what __call__ raises.
        """
        for name in ("return_assistant_tokens_mask", "load_audio_from_video"):
            if kwargs.pop(name, None):
                raise InputError(f"apply_chat_template does not support {name}=True")
        mode = special_tokens_in_text or ("escape" if sanitize_control_tokens else "error")
        call, variables = _split_keywords(processor_kwargs, kwargs)
        prompts, mark, conversations, batched = self._prompts(
            conversation, chat_template, add_generation_prompt, continue_final_message, mode,
            {"tools": tools, "documents": documents, **variables},
        )  # fmt: skip
        if not tokenize:
            if mark is not None:
                raise PromptError("special_tokens_in_text='escape' needs tokenize=True: a string has no escaped form")
            return prompts if batched else prompts[0]
        images, videos = (chat.collect_media(conversations, kind) for kind in ("image", "video"))
        images = call.pop("images") if "images" in call else images if any(images) else None
        videos = videos if any(videos) else None
        self._sampling_defaults(call, videos)
        if self.tokenizer.bos_token and prompts[0].startswith(self.tokenizer.bos_token):
            call.setdefault("add_special_tokens", False)
        media = {"return_tensors": return_tensors}
        media["pixel_format"], media["limits"] = call.pop("pixel_format", "float32"), call.pop("limits", None)
        check_return_tensors(return_tensors)
        return_metadata = call.pop("return_metadata", False)
        groups = [call.pop(name, None) for name in ("text_kwargs", "images_kwargs", "videos_kwargs")]
        options = sort_arguments(call, *groups)
        out = self._process(images, prompts, videos, *options, media, return_metadata, mark)
        return out if return_dict else out["input_ids"]

    def _sampling_defaults(self, call: dict, videos):
        given = {**call, **(call.get("videos_kwargs") or {})}
        if given.get("num_frames") is None and given.get("fps") is None and self.video_processor.num_frames is None:
            files = any(isinstance(clip, (str, os.PathLike)) for sample in videos or () for clip in sample)
            if not files or "do_sample_frames" in given:
                return
            call.update(_FALLBACK_SAMPLING)
        if "do_sample_frames" not in given:
            call["do_sample_frames"] = True

    def _prompts(self, conversation, chat_template, add_generation_prompt, continue_final_message, mode, variables):
        """(prompts, mark, conversations, whether a batch was passed)."""
        conversations, batched = chat.normalize_conversations(conversation)
        template = self._template(chat_template, conversations)
        unused = sorted(set(variables) - {"tools", "documents"} - chat.variables_of(template))
        if unused:
            raise InputError(f"neither the processor nor the chat template has a use for the argument {unused[0]!r}")
        guarded, variables, mark = self._guard().apply(conversations, chat.plain(variables), mode)
        prompts = chat.render(
            template,
            guarded,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            strings=chat.string_contents(conversation, batched),
            **{**self.tokenizer.special_tokens_map, **variables},
        )
        if mark is not None:
            prompts, mark = self._guard().settle(prompts, mark, mode)
        return prompts, mark, conversations, batched

    def _guard(self) -> Guard:
        own = (self.image_token, self.fake_image_token, self.global_image_token, self.video_token)
        return _guard_for(frozenset({*self.tokenizer.control_tokens, *own}))

    def _template(self, chat_template, conversations) -> str:
        named = self.chat_template if isinstance(self.chat_template, dict) else {}
        if chat_template is not None:
            return named.get(chat_template, chat_template)
        if chat.has_video(conversations):
            return chat.DEFAULT_CHAT_TEMPLATE
        if named and "default" not in named:
            raise PromptError(f"no chat template is called 'default'; pass chat_template, one of {sorted(named)}")
        return named.get("default") or self.chat_template or chat.DEFAULT_CHAT_TEMPLATE

    # ---- counting without decoding

    def count_tokens(self, width: int, height: int, **images_kwargs) -> int:
        """Image tokens of a picture of this size, tiles × image_seq_len: what the vision encoder will deliver for it.

        images_kwargs: overrides for the call, as in the image processor. No pixel is needed or decoded. The markers
        around the tiles come on top: `count_prompt_tokens` counts whole prompts.
        """
        return self.image_processor.plan(height, width, **images_kwargs).num_tiles * self.image_seq_len

    def count_prompt_tokens(self, conversation, *, chat_template=None, add_generation_prompt=False, **kwargs) -> list[int]:
        """Length in tokens of the prompt of each conversation, as apply_chat_template would make it, from the headers
        of its pictures: no pixel is decoded. For conversations without videos."""
        mode = kwargs.pop("special_tokens_in_text", None) or "error"
        call, variables = _split_keywords(None, kwargs)
        limits = call.pop("limits", None) or self.image_processor.limits
        _, image_options, _ = sort_arguments(call, None, None, None)
        prompts, mark, conversations, _ = self._prompts(
            conversation, chat_template, add_generation_prompt, False, mode, variables
        )
        if chat.has_video(conversations):
            raise InputError("count_prompt_tokens counts pictures only; a video has to be opened to know its frames")
        samples = chat.collect_media(conversations, "image")
        self._check_counts(prompts, samples, None)
        turn = image_options.get("exif_transpose", self.image_processor.exif_transpose)
        plan_options = {name: value for name, value in image_options.items() if name in self.image_processor.DEFAULTS}
        blocks = []
        for value in _flat(samples):
            plan = self.image_processor.plan(*image_size(value, limits, turn), **plan_options)
            blocks.append(self.media_tokens.picture(plan.rows, plan.cols))
        return [len(self._encode(text, False, mark)) for text in _expand(prompts, self.image_token, blocks)]

    # ---- back to text

    def decode(self, *args, **kwargs):
        """See SmolVLMTokenizer.decode."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """See SmolVLMTokenizer.batch_decode."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs, skip_special_tokens: bool = True, **kwargs) -> list[str]:
        """The texts of generated rows of ids."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)


@functools.lru_cache(maxsize=8)
def _guard_for(words: frozenset[str]) -> Guard:
    return Guard(words)


def _split_keywords(processor_kwargs, kwargs) -> tuple[dict, dict]:
    """(keywords of __call__, variables of the template)."""
    call = {**(processor_kwargs or {}), **{name: value for name, value in kwargs.items() if name in ALL}}
    return call, {name: value for name, value in kwargs.items() if name not in ALL}


def _list_of_texts(text) -> list[str] | None:
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not all(isinstance(entry, str) for entry in texts):
        raise InputError("text needs a string or a list of strings")
    if not texts:
        raise InputError("text is an empty list")
    return list(texts)


def _expand(texts: list[str] | None, token: str, blocks) -> list[str] | None:
    """Each `token`, text after text, replaced by the next of `blocks`."""
    blocks = iter(blocks)
    return texts and [re.sub(re.escape(token), lambda _: next(blocks), text) for text in texts]


def _flat(nested) -> list:
    return [entry for sample in nested for entry in sample]


def _shorten(counts: list[int]) -> str:
    return str(counts if len(counts) <= 16 else [*counts[:16], "…"])
