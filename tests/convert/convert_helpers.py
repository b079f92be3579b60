"""Tiny checkpoints, made by transformers itself, and the command line in this process and in another."""

import argparse
import json
import logging
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

TEXT = dict(
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=160,
    max_position_embeddings=512,
    rms_norm_eps=1e-5,
    pad_token_id=2,
)
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4)
IMAGE_TOKEN = 150
LAYOUTS = ("smolvlm", "idefics3", "base", "tied")


def make(directory: Path, layout: str = "smolvlm", dtype: str = "float32", shards: int = 1, seed: int = 0) -> Path:
    """A checkpoint written by transformers: random weights in `dtype`, in about `shards` files."""
    reason = "makes its checkpoints with transformers: pip install 'smolvlm-jax[test]'"
    torch, transformers = (pytest.importorskip(name, reason=reason) for name in ("torch", "transformers"))

    family = transformers.Idefics3Config if layout == "idefics3" else transformers.SmolVLMConfig
    config = family(
        vision_config=dict(VISION),
        text_config={**TEXT, "model_type": "llama", "rope_theta": 1e5},
        scale_factor=2,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=2,
        tie_word_embeddings=layout == "tied",
    )
    kind = {"idefics3": transformers.Idefics3ForConditionalGeneration, "base": transformers.SmolVLMModel}.get(
        layout, transformers.SmolVLMForConditionalGeneration
    )
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():  # norms and biases start as ones and zeros, which would hide a mix-up
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(getattr(torch, dtype))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    model.save_pretrained(
        directory, max_shard_size="5GB" if shards == 1 else size // shards + 4_000 * (4 if dtype == "float32" else 2)
    )
    return directory


def add_processor(directory: Path) -> None:
    """A small byte-level tokenizer, whose image token has the id that the checkpoints have, and settings for pictures."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:140]  # letters, digits, punctuation, space: what prompts need
    alphabet += [character for character in "ĊĠ" if character not in alphabet]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([], trainer)
    filler = [f"<filler_{number}>" for number in range(IMAGE_TOKEN - tokenizer.get_vocab_size())]
    ends = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in filler + ends])
    assert tokenizer.token_to_id("<image>") == IMAGE_TOKEN
    tokenizer.save(str(directory / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "bos_token": "<|im_start|>",
            "eos_token": "<end_of_utterance>",
            "pad_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
        "processor_config.json": {"image_seq_len": 16, "processor_class": "SmolVLMProcessor"},
        "preprocessor_config.json": {
            "image_processor_type": "SmolVLMImageProcessor",
            "max_image_size": {"longest_edge": 32},
            "size": {"longest_edge": 64},
            "resample": 1,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


def weights(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a Hugging Face directory, read by the safetensors library; dtypes kept."""
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def bit_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    bits = lambda x: np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and np.array_equal(bits(a[name]), bits(b[name]))
        for name in a
    )


def commands(*arguments: object) -> argparse.Namespace:
    from smolvlm_jax.convert.cli import add_parsers

    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers(required=True))
    return parser.parse_args([str(argument) for argument in arguments])


def call(*arguments: object) -> int:
    """Run a command in this process; its errors pass through."""
    args = commands(*arguments)
    return args.run(args)


def shell(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "smolvlm_jax", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def write_safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file made by hand, with the fault that a test needs."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@contextmanager
def transformers_warnings():
    """The warnings that transformers logs inside the block."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.WARNING:
                found.append(record.getMessage())

    import transformers  # noqa: F401  its logger is set up on import

    logger, handler = logging.getLogger("transformers"), Keep()
    level, logger.disabled = logger.level, False
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # an earlier test, or CI=true in the environment, may have changed it
    try:
        yield found
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
