"""SmolVLMProcessor: text, pictures and videos to what the model reads."""

import os
import re

from ..errors import CheckpointError, InputError, PromptError
from . import chat
from .batch import BatchFeature
from .files import read_json, read_text, write_json, write_text
from .images import SmolVLMImageProcessor, check_return_tensors
from .layout import nest_images
from .prompts import MediaTokens
from .tokenizer import SmolVLMTokenizer
from .videos import SmolVLMVideoProcessor, flatten_videos

_TEXT_ARGUMENTS = (
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_attention_mask",
    "add_special_tokens",
)
_IMAGE_ARGUMENTS = (*SmolVLMImageProcessor.DEFAULTS, *SmolVLMImageProcessor.NEUTRAL, "input_data_format", "num_threads")
_VIDEO_ARGUMENTS = (
    *SmolVLMVideoProcessor.DEFAULTS,
    *SmolVLMVideoProcessor.NEUTRAL,
    "video_metadata",
    "skip_secs",
    "input_data_format",
    "num_threads",
)
_MARK_RANGE = range(0xE000, 0xF8FF)


class SmolVLMProcessor:
    """An image processor, a video processor, a tokenizer and a chat template, working on one prompt.

    image_processor, tokenizer, video_processor: as their classes; image_seq_len: image tokens per tile (64 for the
    256M and 500M, 81 for the 2.2B); chat_template: jinja text, or a dict of named ones with "default" among them; the
    tokenizer's own, then the built-in default, where it is None.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_processor=None,
        image_seq_len: int = 169,
        chat_template=None,
        **kwargs,
    ):
        if tokenizer is None:
            raise InputError("SmolVLMProcessor needs a tokenizer")
        self.image_processor = image_processor or SmolVLMImageProcessor()
        self.tokenizer = tokenizer
        self.video_processor = video_processor or SmolVLMVideoProcessor()
        self.image_seq_len = image_seq_len
        self.chat_template = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)
        self.fake_image_token = getattr(tokenizer, "fake_image_token", "<fake_token_around_image>")
        self.image_token = getattr(tokenizer, "image_token", "<image>")
        self.end_of_utterance_token = getattr(tokenizer, "end_of_utterance_token", "<end_of_utterance>")
        self.global_image_token = getattr(tokenizer, "global_image_token", "<global-img>")
        self.video_token = getattr(tokenizer, "video_token", "<video>")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self._extra = kwargs

    # ---- files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "SmolVLMProcessor":
        """From the directory of a checkpoint: v4 files, v5's nested processor_config.json, or defaults for what is
        missing; only a tokenizer has to be there. Keywords go to the image processor (and image_seq_len,
        chat_template to this class). Raises CheckpointError."""
        directory = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(directory):
            raise CheckpointError(f"no directory {directory!r}; pass a local directory of a checkpoint")
        own = read_json(os.path.join(directory, "processor_config.json"), missing_ok=True)
        template = kwargs.pop("chat_template", None) or _template_of(directory, own)
        image_seq_len = kwargs.pop("image_seq_len", None) or own.get("image_seq_len", 169)
        shared = {name: value for name, value in kwargs.items() if name in SmolVLMVideoProcessor.DEFAULTS}
        return cls(
            SmolVLMImageProcessor.from_pretrained(directory, **kwargs),
            SmolVLMTokenizer.from_pretrained(directory),
            SmolVLMVideoProcessor.from_pretrained(directory, **shared),
            image_seq_len=image_seq_len,
            chat_template=template,
        )

    def save_pretrained(self, save_directory) -> list[str]:
        """Write everything in the v5 form: processor_config.json, chat_template.jinja and the tokenizer's files."""
        paths = [write_json(save_directory, "processor_config.json", self.to_dict())]
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        for name, text in templates.items():
            if text is None:
                continue
            if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
                raise InputError(f"the chat template's name {name!r} makes no file name")
            path = "chat_template.jinja" if name == "default" else f"{name}.jinja"
            folder = save_directory if name == "default" else os.path.join(save_directory, "additional_chat_templates")
            paths.append(write_text(folder, path, text))
        return paths + self.tokenizer.save_pretrained(save_directory)

    def to_dict(self) -> dict:
        return {
            "image_processor": self.image_processor.to_dict(),
            "video_processor": self.video_processor.to_dict(),
            "image_seq_len": self.image_seq_len,
            "processor_class": type(self).__name__,
        }

    # ---- calls

    @property
    def media_tokens(self) -> MediaTokens:
        return MediaTokens(self.image_seq_len, self.fake_image_token, self.image_token, self.global_image_token)

    def __call__(
        self,
        images=None,
        text=None,
        videos=None,
        *,
        return_tensors: str | None = None,
        return_metadata: bool = False,
        pixel_format: str = "float32",
        limits=None,
        text_kwargs: dict | None = None,
        images_kwargs: dict | None = None,
        videos_kwargs: dict | None = None,
        **kwargs,
    ) -> BatchFeature:
        """input_ids, attention_mask, and the pixels of pictures or videos.

        text: a string or a list; each `<image>` or `<video>` in it is the place of one picture or video.
        """
        check_return_tensors(return_tensors)
        if images is None and text is None and videos is None:
            raise InputError("nothing to process; pass text, images or videos")
        if images is not None and videos is not None:
            raise InputError("images and videos in one call; the model reads one or the other, so call twice")
        text_options, image_options, video_options = _sort_arguments(kwargs, text_kwargs, images_kwargs, videos_kwargs)
        texts = self._texts(text)
        nested = None if images is None else nest_images(images)
        flat = None if videos is None else flatten_videos(videos)
        if texts is not None:
            self._check_counts(texts, nested, flat)
        data, blocks, token = {}, [], None
        if nested is not None:
            token = self.image_token
            data = self.image_processor(
                nested,
                return_row_col_info=True,
                return_tensors=return_tensors,
                pixel_format=pixel_format,
                limits=limits,
                **image_options,
            )
            grids = [
                pair
                for rows, cols in zip(data.pop("rows"), data.pop("cols"), strict=True)
                for pair in zip(rows, cols, strict=True)
            ]
            blocks = [self.media_tokens.picture(*grid) for grid in grids]
        elif flat is not None:
            token = self.video_token
            data = self.video_processor(
                flat,
                return_metadata=True,
                return_tensors=return_tensors,
                pixel_format=pixel_format,
                limits=limits,
                **video_options,
            )
            metadata = data.pop("video_metadata")
            if texts is not None:
                blocks = self._video_blocks(metadata)
        out = {}
        if texts is not None:
            out = self._tokenize(_expand(texts, token, blocks), text_options, return_tensors)
        out = BatchFeature({**out, **data})
        if flat is not None and return_metadata:
            out["video_metadata"] = metadata
        return out

    def _texts(self, text) -> list[str] | None:
        if text is None:
            return None
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            raise InputError("text needs a string or a list of strings")
        return list(texts)

    def _check_counts(self, texts, nested, flat):
        slots = [t.count(self.image_token) for t in texts]
        if nested is None and any(slots):
            raise InputError(f"{sum(slots)} {self.image_token} in the text, but no images were passed")
        if nested is not None:
            given = [len(sample) for sample in nested]
            if slots != given:
                raise InputError(
                    f"{self.image_token} occurs {slots} times in the texts, and the samples have {given} images; the "
                    "counts have to agree text by text (a flat list of images is one sample)"
                )
        slots = sum(t.count(self.video_token) for t in texts)
        given = 0 if flat is None else len(flat)
        if slots != given:
            raise InputError(f"{self.video_token} occurs {slots} times in the texts, and there are {given} videos")

    def _video_blocks(self, metadata) -> list[str]:
        most = max(len(m.frames_indices) for m in metadata)
        blocks = []
        for m in metadata:
            if m.fps is None:
                m.fps = 24
            blocks.append(self.media_tokens.video(most, m.timestamps, m.duration))
        return blocks

    def _tokenize(self, texts: list[str], options: dict, return_tensors) -> BatchFeature:
        add_special_tokens = options.pop("add_special_tokens", True)
        rows = [self._encode(text, add_special_tokens) for text in texts]
        counts = [row.count(self.image_token_id) for row in rows]
        batch = self.tokenizer.pad(rows, return_tensors=return_tensors, **options)
        left = [list(row).count(self.image_token_id) for row in batch["input_ids"]]
        if left != counts:
            row = next(i for i, (a, b) in enumerate(zip(left, counts, strict=True)) if a != b)
            raise InputError(
                f"text {row} has {len(rows[row])} tokens, {counts[row]} of them image tokens, and truncation leaves "
                f"{left[row]} of those; allow max_length={len(rows[row])} or use fewer tiles"
            )
        return batch

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        tools=None,
        documents=None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        """Messages to a prompt, or with tokenize=True to what the model reads."""
        conversations, batched = chat.normalize_conversations(conversation)
        template = self._template(chat_template, conversations)
        variables = {"tools": tools, "documents": documents, **self.tokenizer.special_tokens_map}
        call = dict(processor_kwargs or {})
        known = {
            *_TEXT_ARGUMENTS,
            *_IMAGE_ARGUMENTS,
            *_VIDEO_ARGUMENTS,
            "pixel_format",
            "limits",
            "return_metadata",
            "text_kwargs",
            "images_kwargs",
            "videos_kwargs",
        }
        for name, value in kwargs.items():
            if name in known:
                call[name] = value
            else:
                variables[name] = value
        prompts = chat.render(
            template,
            conversations,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )
        if not tokenize:
            return prompts if batched else prompts[0]
        images, videos = chat.collect_media(conversations, "image"), chat.collect_media(conversations, "video")
        call.setdefault("num_frames", self.video_processor.num_frames)
        call.setdefault("fps", self.video_processor.fps)
        if call["num_frames"] is not None or call["fps"] is not None:
            call.setdefault("do_sample_frames", True)
        out = self(
            text=prompts,
            images=images if any(images) else None,
            videos=videos if any(videos) else None,
            return_tensors=return_tensors,
            **call,
        )
        return out if return_dict else out["input_ids"]

    def _template(self, chat_template, conversations) -> str:
        own = self.chat_template if isinstance(self.chat_template, dict) else {}
        if chat_template is not None:
            return own.get(chat_template, chat_template)
        if chat.has_video(conversations):
            return chat.DEFAULT_CHAT_TEMPLATE
        if own:
            if "default" not in own:
                raise PromptError(f"no chat template is called 'default'; pass chat_template, one of {sorted(own)}")
            return own["default"]
        return self.chat_template or chat.DEFAULT_CHAT_TEMPLATE

    def count_tokens(self, width: int, height: int, **images_kwargs) -> int:
        """Image tokens in the prompt of a picture of this size: tiles × image_seq_len, without decoding a pixel."""
        return self.image_processor.plan(height, width, **images_kwargs).num_tiles * self.image_seq_len

    def decode(self, *args, **kwargs):
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


def _expand(texts: list[str], token: str | None, blocks: list[str]) -> list[str]:
    """Each occurrence of `token`, text after text, replaced by the next block."""
    if token is None:
        return texts
    remaining = iter(blocks)
    return [re.sub(re.escape(token), lambda _: next(remaining), text) for text in texts]


def _sort_arguments(kwargs, text_kwargs, images_kwargs, videos_kwargs):
    groups = (
        (_TEXT_ARGUMENTS, dict(text_kwargs or {})),
        (_IMAGE_ARGUMENTS, dict(images_kwargs or {})),
        (_VIDEO_ARGUMENTS, dict(videos_kwargs or {})),
    )
    for name, value in kwargs.items():
        takers = [options for names, options in groups if name in names]
        if not takers:
            raise InputError(f"SmolVLMProcessor has no argument {name!r}")
        for options in takers:
            if name in options:
                raise InputError(f"{name!r} was passed twice, on its own and in a dictionary")
            options[name] = value
    return [options for _, options in groups]


def _template_of(directory: str, own: dict):
    """The chat template of a checkpoint: chat_template.json, chat_template.jinja, or what processor_config.json says."""
    if own.get("chat_template"):
        return own["chat_template"]
    legacy = read_json(os.path.join(directory, "chat_template.json"), missing_ok=True).get("chat_template")
    if legacy:
        return legacy
    templates = {}
    path = os.path.join(directory, "chat_template.jinja")
    if os.path.exists(path):
        templates["default"] = read_text(path)
    folder = os.path.join(directory, "additional_chat_templates")
    if os.path.isdir(folder):
        for name in sorted(os.listdir(folder)):
            if name.endswith(".jinja"):
                templates[name[: -len(".jinja")]] = read_text(os.path.join(folder, name))
    return templates["default"] if list(templates) == ["default"] else templates or None
