"""The recipe of the bundled checkpoint `tiny`: a SmolVLM-shaped model that reads handwritten numbers.

    smolvlm-jax train tiny-numbers                                              # about an hour on two CPU cores; resumes
    python -m smolvlm_jax.train.recipes.tiny_numbers evaluate [--model DIR]

It learns to read one to four digits, and to say which of two pictures shows the larger number. Every step sees fresh
pictures, made from a seed and the step's number alone. Pictures start out alike, with digits of one size in one place, and
grow free: from random places and sizes at once the encoder learns nothing for thousands of steps, because features averaged
over the image tokens say nothing about a small digit somewhere; in one place a digit is read after a hundred.
"""

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path

import numpy as np

from ...config import SmolVLMConfig, SmolVLMTextConfig, SmolVLMVisionConfig
from ..config import DataConfig, MeshConfig, TrainConfig
from ..data import collate
from .numbers import Style, comparison, comparison_in_words, reading
from .tiny_tokenizer import write_processor_files

__all__ = ["TILE", "main", "make_batches", "model_config", "train_config"]

TILE = 48
READINGS, COMPARED, IN_WORDS = 52, 16, 32  # rows of a step: one picture each, two pictures each, none
DIGIT_STEPS = 150  # one digit more every so many steps
FREE_FROM, FREE_TO = 500, 2000  # steps over which pictures grow from uniform to free
# A wide picture makes 1 × 2 tiles and the global view, another 2 × 2 and the global view. Fixed shares keep shapes static.
SQUARE_READINGS, SQUARE_COMPARED = 13, 8
READING_TILES = 3 * (READINGS - SQUARE_READINGS) + 5 * SQUARE_READINGS
COMPARED_TILES = 3 * (2 * COMPARED - SQUARE_COMPARED) + 5 * SQUARE_COMPARED
READING_LENGTH, COMPARED_LENGTH, IN_WORDS_LENGTH = 64, 112, 56


STEPS, RESTART = 7800, 6000


def train_config(steps: int = STEPS) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        learning_rate=2e-3,
        restarts=((RESTART, 8e-4),),
        warmup_steps=200,
        weight_decay=0.05,
        beta2=0.98,
        clip_norm=1.0,
        checkpoint_every=500,
        dtype="float32",
        mesh=MeshConfig(devices=1),
        output="runs/tiny",
        data=DataConfig(generated="tiny-numbers"),
    )


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


def make_batches(processor, seed: int, step: int) -> tuple[dict, ...]:
    """The three batches of a step: readings, comparisons of pictures, comparisons in words.

    Long numbers are read more often than short ones, because they are harder; comparing is learned mostly from words, which
    cost next to nothing.
    """
    rng = np.random.default_rng([seed, step])
    longest = min(4, 1 + step // DIGIT_STEPS)
    style = Style(free=float(np.clip((step - FREE_FROM) / (FREE_TO - FREE_FROM), 0, 1)))
    square = set(rng.permutation(READINGS)[:SQUARE_READINGS].tolist())
    odds = np.arange(2, 2 + longest) / np.arange(2, 2 + longest).sum()
    lengths = rng.choice(np.arange(1, 1 + longest), READINGS, p=odds)
    readings = [reading(rng, False, int(lengths[row]), row not in square, style) for row in range(READINGS)]
    square = set(rng.permutation(2 * COMPARED)[:SQUARE_COMPARED].tolist())
    pairs = [
        comparison(rng, False, longest, (2 * row not in square, 2 * row + 1 not in square), style) for row in range(COMPARED)
    ]
    words = [comparison_in_words(rng, longest) for _ in range(IN_WORDS)]
    return (
        collate(processor, readings, READING_LENGTH, READING_TILES),
        collate(processor, pairs, COMPARED_LENGTH, COMPARED_TILES),
        collate(processor, words, IN_WORDS_LENGTH),
    )


def prepare(directory: Path) -> SmolVLMConfig:
    """Write the small files of the checkpoint; returns its config."""
    from ...processing.chat import DEFAULT_CHAT_TEMPLATE

    tokens = (TILE // 8 // 3) ** 2
    vocabulary = write_processor_files(directory, TILE, tokens, DEFAULT_CHAT_TEMPLATE)
    config = model_config(vocabulary)
    config.save_pretrained(directory)
    return config


def initial_params(model, seed: int, mesh):
    """Random parameters whose patch filters have zero mean: at first they see ink, not the brightness of the paper."""
    from ...parameters import init_params

    params = init_params(model, seed, mesh=mesh)
    embedding = params["model"]["vision_model"]["embeddings"]["patch_embedding"]
    embedding["kernel"] -= embedding["kernel"].mean((0, 1, 2), keepdims=True)
    return params


def train(out: Path, steps: int, seed: int = 0) -> Path:
    """Train, or continue where the last checkpoint stands, and write the Hugging Face directory `out/model`."""
    return run(dataclasses.replace(train_config(steps), output=str(out), seed=seed)).model


def run(config: TrainConfig, progress: bool | None = None):
    """What `smolvlm-jax train tiny-numbers` does: a TrainResult."""
    import jax

    from ...checkpoint import save_hf
    from ...model import SmolVLMForConditionalGeneration
    from ...processing import SmolVLMProcessor
    from ..curves import draw_curves
    from ..loop import train as fit
    from ..metrics import read_metrics
    from ..runner import TrainResult, open_mesh

    out = Path(config.output)
    files = out / "files"
    processor_config = prepare(files)
    processor = SmolVLMProcessor.from_pretrained(files)
    model = SmolVLMForConditionalGeneration(processor_config)
    mesh = open_mesh(config.mesh)
    params = initial_params(model, config.seed, mesh)
    state = fit(model, params, functools.partial(make_batches, processor, config.seed), config, mesh, out, progress=progress)
    save_hf(out / "model", model, jax.device_get(state.params), companions=files, force=True)
    metrics = read_metrics(out)
    draw_curves(metrics, out / "curves.png")
    return TrainResult(out, out / "model", metrics[-1] if metrics else {}, state)


def evaluate(source: str, readings: int = 1000, comparisons: int = 500, batch: int = 50, progress: bool | None = None) -> dict:
    """Exact match on pictures of held-out digits, by generation.

    As many numbers of one, two, three and four digits each. A comparison counts when the picture named is the right one.
    Returns {"readings": …, "digits": {1: …, …}, "comparisons": …, "split": share of pictures with more than one tile}.
    """
    from tqdm import tqdm

    from ...checkpoint import load, resolve
    from ...generation import generate
    from ...processing import SmolVLMProcessor

    model, params = load(source)
    processor = SmolVLMProcessor.from_pretrained(resolve(source))
    rng = np.random.default_rng(2024)
    lengths = [1 + i % 4 for i in range(readings)]
    tasks = [(reading(rng, True, length), length) for length in lengths]
    tasks += [(comparison(rng, True), 0) for _ in range(comparisons)]
    hits: dict[int, list[bool]] = {kind: [] for kind in range(5)}
    split = []
    show = sys.stderr.isatty() if progress is None else progress
    for start in tqdm(range(0, len(tasks), batch), disable=not show, unit="batch"):
        part = tasks[start : start + batch]
        inputs = processor.apply_chat_template(
            [example.messages for example, _ in part],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            padding=True,
            padding_side="left",
            return_tensors="np",
            pixel_format="uint8",
        )
        sequences = generate(model, params, **inputs, max_new_tokens=20)
        answers = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (example, kind), answer in zip(part, answers, strict=True):
            got, wanted = answer.strip(), example.answer
            hits[kind].append(got == wanted if kind else got.split(". ")[-1] == wanted.split(". ")[-1])
            for item in example.messages[0]["content"]:
                if item["type"] == "image":
                    image = item["image"]
                    split.append(processor.image_processor.get_number_of_image_patches(image.height, image.width)[0] > 1)
    share = lambda values: sum(values) / max(len(values), 1)
    return {
        "readings": share([hit for kind in range(1, 5) for hit in hits[kind]]),
        "digits": {kind: share(hits[kind]) for kind in range(1, 5)},
        "comparisons": share(hits[0]),
        "split": share(split),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m smolvlm_jax.train.recipes.tiny_numbers", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train, or continue a run")
    command.add_argument("--out", type=Path, default=Path("runs/tiny"))
    command.add_argument("--steps", type=int, default=STEPS)
    command = commands.add_parser("evaluate", help="exact match on held-out digits")
    command.add_argument("--model", default="tiny")
    command.add_argument("--readings", type=int, default=1000)
    command.add_argument("--comparisons", type=int, default=500)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    if options.command == "train":
        print(f"wrote {train(options.out, options.steps)} after {(time.perf_counter() - started) / 60:.1f} minutes")
        return 0
    result = evaluate(options.model, options.readings, options.comparisons)
    print(f"numbers of 1 to 4 digits read exactly: {result['readings']:.1%} of {options.readings}")
    for digits, value in result["digits"].items():
        print(f"  {digits} digit{'s' * (digits > 1)}: {value:.1%}")
    print(f"larger of two numbers named: {result['comparisons']:.1%} of {options.comparisons}")
    print(f"pictures with more than one tile: {result['split']:.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
