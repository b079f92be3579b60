"""Inputs that the golden cases were made from, as integer formulas, and the golden results."""

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "data" / "processing"

# The chat template of Docling's models.
DOCLING = (
    "{%- for message in messages -%}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] == 'image' -%}{{- '<image>' -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|end_of_text|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant' -}}"
    "{%- if controls -%}{{- ' ' + controls | tojson() -}}{%- endif -%}{{- '<|end_of_role|>' -}}{%- endif -%}"
)


def _triangle(t, p):
    return np.abs(np.mod(t, 2 * p) - p) * 255 // p


def tri_img(h, w):
    """A smooth picture, uint8 (h, w, 3)."""
    y, x, k = np.mgrid[0:h, 0:w, 0:3].astype(np.int64)
    return ((_triangle(x + 7 * k, 23 + k) + _triangle(2 * y + 5 * k, 31)) // 2).astype(np.uint8)


def hash_img(h, w):
    """A noisy picture, uint8 (h, w, 3)."""
    y, x, k = np.mgrid[0:h, 0:w, 0:3].astype(np.int64)
    return (((x * 7919 + y * 104729 + k * 1299709) ^ ((x * y * 31) >> 3)) & 255).astype(np.uint8)


def tri_video(n, h, w):
    """A smooth picture wandering down and right, uint8 (n, h, w, 3)."""
    return np.stack([np.roll(tri_img(h, w), (3 * i, 5 * i), (0, 1)) for i in range(n)])


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def need(backend):
    """Skip where a decoder is not installed. It is not imported, since two FFmpegs conflict in one process."""
    if importlib.util.find_spec({"decord": "decord", "pyav": "av"}[backend]) is None:
        pytest.skip(f"{backend} is not installed")


def unrolled(rle):
    return [value for value, count in rle for _ in range(count)]


@pytest.fixture(scope="session")
def data():
    return DATA


@pytest.fixture(scope="session")
def golden():
    return json.loads((DATA / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_arrays():
    return np.load(DATA / "golden.npz")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A directory with the published tokenizer and processor files (no weights)."""
    from real_tokenizer import write_checkpoint_files

    return write_checkpoint_files(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    from smolvlm_jax.processing import SmolVLMTokenizer

    return SmolVLMTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def small():
    from smolvlm_jax.processing import SmolVLMImageProcessor

    return SmolVLMImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 16})


@pytest.fixture(scope="session")
def small_video():
    from smolvlm_jax.processing import SmolVLMVideoProcessor

    return SmolVLMVideoProcessor(
        size={"longest_edge": 64},
        max_image_size={"longest_edge": 32},
        video_sampling={"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 64}},
    )


@pytest.fixture(scope="session")
def processor(small, small_video, tokenizer):
    """Tiles of 16 pixels, 4 tokens each, with the real tokenizer."""
    from real_tokenizer import TEMPLATE

    from smolvlm_jax.processing import SmolVLMProcessor

    return SmolVLMProcessor(small, tokenizer, small_video, image_seq_len=4, chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def own_checkpoint(tmp_path_factory):
    """A directory of our own: a small byte-level BPE with row and column markers up to 2×2, and no template."""
    return write_own_checkpoint(tmp_path_factory.mktemp("own"))


def write_own_checkpoint(directory):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<global-img>"]
    special += [f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)]
    special += ["<fake_token_around_image>", "<image>", "<end_of_utterance>"]
    letters = {token: id for id, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": "<end_of_utterance>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    preprocessor = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (directory / "processor_config.json").write_text(json.dumps({"image_seq_len": 4}))
    return directory
