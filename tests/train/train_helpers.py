"""What the tests of training share: a model of one layer each, and conversations on disk."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import handwritten_numbers as numbers
import numpy as np
import photographs
import tiny_files
from PIL import Image

from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.train.config import DataConfig
from smolvlm_jax.train.packing import BatchShape, make_batch
from smolvlm_jax.train.samples import make_sample

ROOT = Path(__file__).resolve().parents[2]


def write_records(folder: Path, count: int, seed: int = 0, name: str = "train") -> Path:
    """JSONL with pictures of numbers: readings, comparisons of two pictures, and comparisons in words."""
    rng = np.random.default_rng(seed)
    kinds = (
        lambda: numbers.reading(rng, False),
        lambda: numbers.comparison(rng, False, 2),
        lambda: numbers.comparison_in_words(rng),
    )
    photographs.save([kinds[i % 3]() for i in range(count)], folder, name)
    return folder / f"{name}.jsonl"


def user(*texts: str, pictures: int = 0) -> dict:
    """A turn with so many pictures in front of its texts."""
    image = {"type": "image", "image": Image.new("RGB", (60, 40), (90, 120, 200))}
    return {"role": "user", "content": [image] * pictures + [{"type": "text", "text": t} for t in texts]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def as_conversation(example: numbers.Example) -> list[dict]:
    """The messages of an example with its answer."""
    return [*example.messages, {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}]


def batch_of(processor: SmolVLMProcessor, examples, length: int, tiles: int) -> dict[str, np.ndarray]:
    """A batch with one example a row."""
    samples = [make_sample(processor, as_conversation(example), DataConfig(length=length)) for example in examples]
    shape = BatchShape(rows=len(samples), length=length, tiles=tiles, tile_size=tiny_files.TILE)
    return make_batch([[sample] for sample in samples], shape, processor.tokenizer.pad_token_id)


def small_checkpoint(folder: Path, seed: int = 0, layers: int = 1) -> Path:
    """A Hugging Face directory with random weights: the bundled model's shapes with so many layers each, and its processor."""
    from smolvlm_jax import SmolVLMForConditionalGeneration, init_params, save_hf

    files = folder / "files"
    config = tiny_files.write(files)
    config = config.replace(
        vision_config=config.vision_config.replace(num_hidden_layers=layers),
        text_config=config.text_config.replace(num_hidden_layers=layers),
    )
    model = SmolVLMForConditionalGeneration(config)
    save_hf(folder / "model", model, init_params(model, seed), companions=files)
    return folder / "model"


def recipe(folder: Path, model: Path, **changes) -> Path:
    """A recipe file of a small run on two fake devices at most; changes replace whole keys, nested ones as a mapping."""
    import yaml

    data = {
        "model": str(model),
        "output": str(folder / "run"),
        "steps": 6,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "log_every": 1,
        "checkpoint_every": 2,
        "mesh": {"devices": 1},
        "data": {"train": str(folder / "train.jsonl"), "length": 192, "batch_size": 4, "tiles_per_row": 12},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            data[key] = {**data[key], **value}
        else:
            data[key] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def environment(devices: int = 1, **more) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **more,
    }


def start(recipe: Path, *words: str, devices: int = 1, **more) -> subprocess.Popen:
    """`smolvlm-jax train` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "smolvlm_jax", "train", str(recipe), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(devices, **more),
        cwd=ROOT,
    )


def losses(directory: Path) -> dict[int, float]:
    """step -> loss, of a run."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


# What a run says of itself off a terminal.
TOLD = re.compile(
    r"smolvlm-jax: (model .* parameters; trained are |[\d,]+ records? from |held out: |resuming from step |step [\d,]+ of "
    r"|memory: a step needs at most about |compiled in |\S+ was \S+, is \S+.* from step "
    r"|padding, which is computed|skipped so far, of |the run is finished at step |the warm-up takes |\S+/model is that of "
    r"|(opening|loading|looking|reading|compiling|computing|writing|sending|waiting) |stopping: the step under way"
    r"|stopped at step )"
)


def complaints(stderr: str) -> list[str]:
    """The lines that a run wrote off a terminal, without those on how far it is."""
    return [line for line in stderr.splitlines() if not TOLD.match(line)]
