"""SmolVLMProcessor read from the files of a checkpoint, and written to them."""

import os
from typing import Any, Self

from ..habits import SaysWhatToType, no_attribute
from ..io import to_json, write_json
from . import checkpoint_files
from .images import SmolVLMImageProcessor
from .tokenizer import SmolVLMTokenizer
from .videos import SmolVLMVideoProcessor

__all__ = ["ProcessorFiles"]

_INSTEAD = {
    "push_to_hub": "save_pretrained(directory), then huggingface_hub's upload_folder",
    "get_processor_dict": "from_pretrained(source).to_dict()",
    "from_args_and_dict": "SmolVLMProcessor(image_processor, tokenizer, video_processor)",
    "register_for_auto_class": "there are no classes that a checkpoint names",
}


class ProcessorFiles(metaclass=SaysWhatToType):
    """Base of SmolVLMProcessor, which describes the attributes."""

    _instead = _INSTEAD
    image_processor: SmolVLMImageProcessor
    video_processor: SmolVLMVideoProcessor
    tokenizer: SmolVLMTokenizer
    image_seq_len: int
    chat_template: str | dict[str, str] | None

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, self._instead)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """The processor of a checkpoint.

        Args:
            pretrained_model_name_or_path: what `load` takes: a directory, the name of a bundled checkpoint, or a Hub id. Only a
                tokenizer has to be there; other files have defaults.
            **kwargs: image_seq_len, chat_template, image_processor, video_processor and tokenizer, and arguments of the three,
                which override the files; each goes to every part that knows it. Also revision, subfolder, cache_dir,
                force_download, local_files_only and token.

        Returns:
            The processor.

        Raises:
            CheckpointError: the checkpoint or the tokenizer is missing, or a file is broken.
            InputError: no part knows a keyword.
        """
        return cls(**checkpoint_files.load_parts(pretrained_model_name_or_path, kwargs))

    def save_pretrained(self, save_directory: str | os.PathLike) -> list[str]:
        """Write all files in the form of transformers 5; `from_pretrained` of the directory gives an equal processor.

        Args:
            save_directory: made if need be. It gets processor_config.json, chat_template.jinja and the tokenizer's files.

        Returns:
            The paths of the files written.
        """
        return [
            write_json(os.path.join(save_directory, "processor_config.json"), self.to_dict(), sort_keys=True),
            *checkpoint_files.save_templates(save_directory, self.chat_template),
            *self.tokenizer.save_pretrained(save_directory),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The contents of processor_config.json.

        Returns:
            Keys and values in the form of transformers 5.
        """
        return {
            "image_processor": self.image_processor.to_dict(),
            "video_processor": self.video_processor.to_dict(),
            "image_seq_len": self.image_seq_len,
            "processor_class": type(self).__name__,
        }

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON text.

        Returns:
            The text.
        """
        return to_json(self.to_dict(), indent=2, sort_keys=True).decode()

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write `to_json_string` to a file.

        Args:
            json_file_path: the file.
        """
        write_json(json_file_path, self.to_dict(), sort_keys=True)
