"""The small files of the bundled checkpoint `tiny`: configuration, tokenizer with its own small vocabulary, processor.

    python examples/tiny_files.py runs/tiny-files

They are the same as those in the package (smolvlm_jax/assets/tiny); only the weights are trained (handwritten_numbers.py).
"""

import argparse
from pathlib import Path

from handwritten_numbers import COMPARISONS, QUESTIONS

from smolvlm_jax import SmolVLMConfig
from smolvlm_jax.config import SmolVLMTextConfig, SmolVLMVisionConfig
from smolvlm_jax.io import write_json
from smolvlm_jax.processing.template import DEFAULT_CHAT_TEMPLATE

TILE = 48
VOCAB_SIZE = 512  # at most; the few texts it is trained on give fewer
LEADING = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TRAILING = (
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
TEXTS = (
    *QUESTIONS,
    *COMPARISONS,
    "User: Assistant: System:",
    " 0123456789 > < . The first. The second.",
    "The quick brown fox jumps over the lazy dog. How many pictures are there, and what do they show?",
)


def _tokenizer():
    """Byte-level BPE with digits apart, as SmolLM2's, with the special tokens where SmolVLM has them:
    three at the beginning, the rest at the end."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TRAILING),
        special_tokens=list(LEADING),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 8, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in TRAILING])
    return tokenizer


_NAMED_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
_PICTURE_STEPS = ("do_convert_rgb", "do_image_splitting", "do_normalize", "do_pad", "do_rescale", "do_resize")


def write_processor_files(directory: Path) -> dict[str, int]:
    """Write tokenizer, chat template, image processor and generation files in Hugging Face format; returns the vocabulary."""
    tokenizer = _tokenizer()
    vocabulary = tokenizer.get_vocab()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            **_NAMED_TOKENS,
            "additional_special_tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1024,
            "truncation_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "SmolVLMProcessor",
        },
        "special_tokens_map.json": _NAMED_TOKENS,
        "chat_template.json": {"chat_template": DEFAULT_CHAT_TEMPLATE},
        "processor_config.json": {"image_seq_len": (TILE // 8 // 3) ** 2, "processor_class": "SmolVLMProcessor"},
        "preprocessor_config.json": {
            **dict.fromkeys(_PICTURE_STEPS, True),
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "SmolVLMImageProcessor",
            "max_image_size": {"longest_edge": TILE},
            "processor_class": "SmolVLMProcessor",
            "resample": 1,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": 2 * TILE},
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": TILE}},
        },
        "generation_config.json": {
            "bos_token_id": vocabulary["<|im_start|>"],
            "eos_token_id": vocabulary["<end_of_utterance>"],
            "pad_token_id": vocabulary["<|im_end|>"],
        },
    }
    for name, content in files.items():
        write_json(directory / name, content)
    return vocabulary


def model_config(vocabulary: dict[str, int]) -> SmolVLMConfig:
    """About 0.9 million parameters; 6 × 6 patches a tile, of which pixel shuffle makes 4 image tokens."""
    vision = SmolVLMVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=TILE,
        patch_size=8,
        initializer_range=0.1,  # 1/√96: the usual 0.02 suits a width of 2,500
    )
    text = SmolVLMTextConfig(
        vocab_size=-(-len(vocabulary) // 64) * 64,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=1024,
        initializer_range=0.1,
        rms_norm_eps=1e-5,
        bos_token_id=vocabulary["<|im_start|>"],
        eos_token_id=vocabulary["<end_of_utterance>"],
        pad_token_id=vocabulary["<|im_end|>"],
        tie_word_embeddings=True,
    )
    return SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        scale_factor=3,
        image_token_id=vocabulary["<image>"],
        pad_token_id=vocabulary["<|im_end|>"],
        tie_word_embeddings=True,
    )


def write(directory: Path) -> SmolVLMConfig:
    """Write all files but the weights; returns the configuration."""
    config = model_config(write_processor_files(directory))
    config.save_pretrained(directory)
    return config


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    write(parser.parse_args().directory)
