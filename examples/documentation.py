"""The examples of transformers' documentation of SmolVLM, with the import line changed and the files of this folder.

    python examples/documentation.py

Arrays are numpy's here (`return_tensors="np"`), and dtypes have their names; everything else is as it stands there.
"""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from smolvlm_jax import (
    AutoModelForImageTextToText,
    AutoProcessor,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMVisionConfig,
    SmolVLMVisionTransformer,
)

CHECKPOINT = "tiny"
PICTURES = Path(__file__).parent


def single_picture() -> str:
    """Single Media inference: a picture."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="float32", device_map="auto")
    conversation = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(PICTURES / "number.png")},
                {"type": "text", "text": "What number is written here?"},
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    ).to(model.device, dtype="float32")
    output_ids = model.generate(**inputs, max_new_tokens=16)
    generated_texts = processor.batch_decode(output_ids, skip_special_tokens=True)
    return generated_texts[0]


def video() -> str:
    """Single Media inference: a video, here given as the files of its frames."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="float32", device_map="auto")
    with tempfile.TemporaryDirectory() as folder:
        frames = [str(Path(folder) / f"{number}.png") for number in range(2)]
        for number, frame in enumerate(frames):
            Image.fromarray(np.full((24, 32, 3), 100 * number, np.uint8)).save(frame)
        conversation = [
            {
                "role": "user",
                "content": [
                    {"type": "video", "path": frames},
                    {"type": "text", "text": "Describe this video in detail"},
                ],
            },
        ]
        inputs = processor.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
        ).to(model.device)
    generated_ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    generated_texts = processor.batch_decode(generated_ids, skip_special_tokens=True)
    return generated_texts[0]


def mixed_batch() -> list[str]:
    """Batch Mixed Media Inference: one picture, two pictures, none."""
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype="float32", device_map="auto")
    conversation1 = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(PICTURES / "seven.png")},
                {"type": "text", "text": "Describe this image."},
            ],
        }
    ]
    conversation2 = [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(PICTURES / "seven.png")},
                {"type": "image", "path": str(PICTURES / "ninety.png")},
                {"type": "text", "text": "What is written in the pictures?"},
            ],
        }
    ]
    conversation3 = [{"role": "user", "content": "who are you?"}]
    inputs = processor.apply_chat_template(
        [conversation1, conversation2, conversation3],
        add_generation_prompt=True,
        tokenize=True,
        padding=True,
        padding_side="left",
        return_dict=True,
        return_tensors="np",
    ).to(model.device)
    generated_ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return processor.batch_decode(generated_ids, skip_special_tokens=True)


def custom_size() -> tuple[int, ...]:
    """Usage tips: a custom size."""
    image_processor = SmolVLMImageProcessor(do_resize=True, size={"longest_edge": 2 * 512}, max_image_size=512)
    return image_processor(Image.open(PICTURES / "number.png"), return_tensors="np")["pixel_values"].shape


def classes() -> tuple[int, int]:
    """The examples of the classes, with their defaults."""
    configuration = SmolVLMVisionConfig()
    model = SmolVLMVisionTransformer(configuration)
    configuration = model.config
    return configuration.hidden_size, SmolVLMConfig().scale_factor


if __name__ == "__main__":
    print(single_picture())
    print(video())
    print(mixed_batch())
    print(custom_size())
    print(classes())
