"""Ids to text, by a processor's tokenizer."""

from typing import Any

from .tokenizer import SmolVLMTokenizer

__all__ = ["ProcessorTexts"]


class ProcessorTexts:
    """Base of SmolVLMProcessor, which describes the attributes."""

    tokenizer: SmolVLMTokenizer

    def decode(self, *args: Any, **kwargs: Any) -> str | list[str]:
        """As `SmolVLMTokenizer.decode`.

        Args:
            *args: its arguments.
            **kwargs: likewise.

        Returns:
            A string, or a list of strings for several rows.
        """
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """As `SmolVLMTokenizer.batch_decode`.

        Args:
            *args: its arguments.
            **kwargs: likewise.

        Returns:
            A string for each row.
        """
        return self.tokenizer.batch_decode(*args, **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """`SmolVLMTokenizer.batch_decode` under transformers' name.

        Args:
            generated_outputs: rows of ids.
            skip_special_tokens: leave special tokens out.
            **kwargs: as there.

        Returns:
            A string for each row.
        """
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
