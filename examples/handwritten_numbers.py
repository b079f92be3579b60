"""Pictures of handwritten numbers and questions about them: what the bundled checkpoint `tiny` was trained on.

    python examples/handwritten_numbers.py make data/numbers        # 655,200 pictures, 7 GB, about 20 minutes on two cores
    smolvlm-jax train tiny-numbers                                  # about an hour on two cores; resumes
    python examples/handwritten_numbers.py evaluate --model runs/tiny/model

The model learns to read one to four digits, and to say which of two pictures shows the larger number. The digits are the
1,797 real handwritten ones that scikit-learn ships, 8 × 8 pixels each. A fixed permutation sets 297 of them aside: they occur
in no training picture, and held-out pictures are made of nothing else.

`make` writes the conversations in the order of a curriculum, fresh pictures for every step of training. At first all digits
have one size and one place; then size, place and brightness vary more and more. With random places and sizes from the
beginning the encoder learns nothing for thousands of steps, because features averaged over the image tokens say nothing about
a small digit somewhere; a digit in a fixed place is read after a hundred steps.
"""

import argparse
import functools
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smolvlm_jax.errors import MissingExtraError, SmolVLMError

SPLIT_SEED = 0
HELD_OUT = 297

STEPS = 7800
READINGS, COMPARED, WORDED = 52, 16, 32  # conversations of a step: with one picture, with two, with none
DIGIT_STEPS = 150  # one digit more every so many steps
FREE_FROM, FREE_TO = 500, 2000  # steps over which pictures grow from uniform to free
# Of the pictures of a step, those that are not wide: 2 × 2 tiles and the global view instead of 1 × 2 and the global view.
SQUARE_READINGS, SQUARE_COMPARED = 13, 8

QUESTIONS = (
    "What number is written here?",
    "Which number is this?",
    "What is the number in the picture?",
    "Read the number.",
    "What number do you see?",
    "Which number does the picture show?",
    "Please read the handwritten number.",
    "Can you read this number?",
    "What does the picture say?",
    "Number?",
)

COMPARISONS = (
    "Which picture shows the larger number?",
    "Which number is larger?",
    "Which of the two pictures shows the larger number?",
    "Compare the two numbers: which is larger?",
    "In which picture is the number larger?",
)


@dataclass(frozen=True)
class Example:
    """A conversation that ends with a user's turn, in the chat format, and its answer."""

    messages: list[dict[str, Any]]
    answer: str


@functools.cache
def digits(held_out: bool) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Ink (m, 8, 8) float32 in [0, 1], values (m,), and for each value 0–9 the rows that show it."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the handwritten digits", "train") from error
    data = load_digits()
    order = np.random.RandomState(SPLIT_SEED).permutation(len(data.target))
    chosen = order[:HELD_OUT] if held_out else order[HELD_OUT:]
    ink, values = (data.images[chosen] / 16).astype(np.float32), data.target[chosen]
    return ink, values, tuple(np.flatnonzero(values == v) for v in range(10))


@dataclass(frozen=True)
class Style:
    """How a picture may look. Lengths are fractions of the picture's longer side."""

    wide: float = 0.75  # share of pictures at least twice as wide as high: they are cut into fewer tiles
    digit: tuple[float, float] = (0.15, 0.27)  # height of a digit
    narrow: tuple[float, float] = (0.70, 1.0)  # width of a digit over its height
    side: tuple[int, int] = (80, 200)  # longer side in pixels
    slant: float = 0.12  # largest rotation and shear, radians
    noise: float = 14.0  # largest standard deviation of the noise, in 0..255
    free: float = 1.0  # 1: size, place and brightness range freely; 0: all fixed; between: so far from fixed


def _stamp(ink: np.ndarray, height: float, width: float, slant: float, rng: np.random.Generator) -> np.ndarray:
    """A digit of about height × width pixels, slightly turned and sheared: float32 ink in [0, 1] with a margin."""
    margin = 1.25
    h, w = int(np.ceil(height * margin)) + 1, int(np.ceil(width * margin)) + 1
    angle, shear = rng.uniform(-slant, slant, 2)
    # Affine map from picture pixels to digit pixels: about the centres, scaled, turned, sheared.
    matrix = np.array([[np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag([8 / width, 8 / height]) @ matrix
    offset = np.array([6.0, 6.0]) - matrix @ np.array([w / 2, h / 2])
    padded = np.zeros((12, 12), np.float32)
    padded[2:10, 2:10] = ink * 255
    source = Image.fromarray(padded.astype(np.uint8))
    coefficients = (matrix[0, 0], matrix[0, 1], offset[0], matrix[1, 0], matrix[1, 1], offset[1])
    turned = source.transform((w, h), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.asarray(turned, np.float32) / 255


def draw(
    number: str, held_out: bool, rng: np.random.Generator, style: Style = Style(), wide: bool | None = None
) -> Image.Image:
    """An RGB picture of a number in digits of one half of the data, somewhere on a canvas of random size and brightness.

    wide: force (not) twice as wide as high; None lets chance decide.
    """
    ink, _, rows = digits(held_out)
    free = style.free

    def pick(low: float, high: float, fixed: float) -> float:
        """Uniform over what lies between the bounds and not too far from the value that is fixed when nothing is free."""
        return float(rng.uniform(fixed + free * (low - fixed), fixed + free * (high - fixed)))

    wide = rng.random() < style.wide if wide is None else wide
    aspect = pick(2.05, 3.6, 2.2) if wide else pick(1.02, 1.9, 1.6)
    long = pick(*style.side, 120)
    canvas_w, canvas_h = round(long), max(8, round(long / aspect))
    tallest = min(style.digit[1], 0.85 / aspect)
    height = pick(min(style.digit[0], tallest), tallest, tallest)
    narrow, gaps = pick(*style.narrow, 0.8), free * rng.uniform(-0.02, 0.12, len(number))
    # Pixels from here on; a number too long for its canvas is made smaller as a whole.
    room = 0.96 * canvas_w
    total = (narrow * len(number) + gaps[:-1].sum()) * height * long
    scale = min(1.0, room / total)
    height, step = height * long * scale, narrow * height * long * scale
    gaps = gaps * height
    total = step * len(number) + gaps[:-1].sum()
    x = pick(0.02 * canvas_w, max(0.021 * canvas_w, 0.98 * canvas_w - total), 0.04 * canvas_w)
    y = pick(0.03 * canvas_h, max(0.031 * canvas_h, 0.97 * canvas_h - height * 1.06), 0.2 * canvas_h)
    coverage = np.zeros((canvas_h, canvas_w), np.float32)
    for character, gap in zip(number, gaps, strict=True):
        tall, drop = height * pick(0.92, 1.04, 1.0), pick(-0.03, 0.03, 0.0) * height
        stamp = _stamp(ink[rng.choice(rows[int(character)])], tall, step, free * style.slant, rng)
        top = round(y + drop + (height - stamp.shape[0]) / 2)
        left = round(x + (step - stamp.shape[1]) / 2)
        y0, x0 = max(top, 0), max(left, 0)
        y1, x1 = min(top + stamp.shape[0], canvas_h), min(left + stamp.shape[1], canvas_w)
        if y1 > y0 and x1 > x0:
            part = coverage[y0:y1, x0:x1]
            np.maximum(part, stamp[y0 - top : y1 - top, x0 - left : x1 - left], out=part)
        x += step + gap
    paper = pick(150, 255, 230) + free * rng.uniform(-12, 12, 3)
    pen = pick(0, 70, 20) + free * rng.uniform(-12, 12, 3)
    picture = paper + coverage[..., None] * (pen - paper)
    picture += rng.normal(0, rng.uniform(0, free * style.noise), (canvas_h, canvas_w, 1))
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))


IN_WORDS = ("{} and {}: which number is larger?", "Which is larger, {} or {}?", "Compare {} and {}.")


def _number(length: int, rng: np.random.Generator) -> str:
    """A number of exactly this many digits; 0 is one of one digit."""
    low = 0 if length == 1 else 10 ** (length - 1)
    return str(rng.integers(low, 10**length))


def _pair(longest: int, rng: np.random.Generator) -> tuple[str, str, str]:
    """Two unequal numbers and the answer, which names both before it judges: what comes first cannot know what follows.

    Half of the pairs have numbers of equal length, so that counting digits is not enough.
    """
    while True:
        lengths = rng.integers(1, longest + 1, 2)
        if rng.random() < 0.5:
            lengths[1] = lengths[0]
        first, second = (_number(int(n), rng) for n in lengths)
        if first != second:
            verdict = "The first." if int(first) > int(second) else "The second."
            return first, second, f"{first} and {second}. {verdict}"


def _ask(pictures: list[Image.Image], question: str, rng: np.random.Generator) -> list[dict]:
    """A user's turn; the question stands behind the pictures, or now and then before them."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    text = {"type": "text", "text": question}
    return [{"role": "user", "content": [text, *content] if rng.random() < 0.2 else [*content, text]}]


def reading(
    rng: np.random.Generator,
    held_out: bool,
    length: int | None = None,
    wide: bool | None = None,
    style: Style = Style(),
) -> Example:
    """One picture; the answer is the number. length: digits, by default 1 to 4 equally often."""
    number = _number(int(rng.integers(1, 5)) if length is None else length, rng)
    return Example(_ask([draw(number, held_out, rng, style, wide)], rng.choice(QUESTIONS), rng), number)


def comparison(
    rng: np.random.Generator,
    held_out: bool,
    longest: int = 4,
    wide: tuple[bool | None, bool | None] = (None, None),
    style: Style = Style(),
) -> Example:
    """Two pictures of unequal numbers; the answer names both and then the picture with the larger one."""
    first, second, answer = _pair(longest, rng)
    pictures = [draw(number, held_out, rng, style, w) for number, w in zip((first, second), wide, strict=True)]
    return Example(_ask(pictures, rng.choice(COMPARISONS), rng), answer)


def comparison_in_words(rng: np.random.Generator, longest: int = 4) -> Example:
    """The same with the numbers in the question and no picture."""
    first, second, answer = _pair(longest, rng)
    return Example(_ask([], str(rng.choice(IN_WORDS)).format(first, second), rng), answer)


# ---- training data


def examples_of_step(step: int, seed: int = 0) -> list[Example]:
    """The conversations of a step of training, in random order: a function of the step and the seed alone.

    Long numbers are read more often than short ones, because they are harder; comparing is learned mostly from words, which
    need no encoder.
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
    words = [comparison_in_words(rng, longest) for _ in range(WORDED)]
    examples = [*readings, *pairs, *words]
    return [examples[number] for number in rng.permutation(len(examples))]


def as_record(example: Example) -> dict[str, Any]:
    """A conversation as a row of a dataset: pictures as the bytes of lossless WebP files."""
    turns = [*example.messages, {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}]
    return {"messages": [{**turn, "content": [_stored(item) for item in turn["content"]]} for turn in turns]}


def _stored(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] != "image":
        return {"type": "text", "text": str(item["text"])}
    buffer = io.BytesIO()
    item["image"].save(buffer, "WEBP", lossless=True, method=0)
    return {"type": "image", "image": {"bytes": buffer.getvalue()}}


def _records_of_step(seed: int, step: int) -> list[dict[str, Any]]:
    return [as_record(example) for example in examples_of_step(step, seed)]


def make(folder: Path, steps: int = STEPS, seed: int = 0, processes: int | None = None, progress: bool = False) -> Path:
    """Write the conversations of `steps` steps to folder/train.arrow, in their order, and return that path."""
    import pyarrow
    from tqdm import tqdm

    text = pyarrow.string()
    picture = pyarrow.struct({"bytes": pyarrow.binary()})
    item = pyarrow.struct({"type": text, "text": text, "image": picture})
    turn = pyarrow.struct({"role": text, "content": pyarrow.list_(item)})
    schema = pyarrow.schema({"messages": pyarrow.list_(turn)})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.arrow"
    partial = folder / ".train.arrow.part"
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool, pyarrow.ipc.new_stream(partial, schema) as stream:
        found = pool.map(functools.partial(_records_of_step, seed), range(steps), chunksize=4)
        for records in tqdm(found, total=steps, unit="step", disable=not progress):
            stream.write_batch(pyarrow.RecordBatch.from_pylist(records, schema))
    partial.replace(path)
    return path


# ---- evaluation


def held_out(readings: int = 1000, comparisons: int = 500) -> Iterator[tuple[Example, int]]:
    """(example of held-out digits, its number of digits or 0 for a comparison): as many of one, two, three and four digits."""
    rng = np.random.default_rng(2024)
    for index in range(readings):
        yield reading(rng, True, 1 + index % 4), 1 + index % 4
    for _ in range(comparisons):
        yield comparison(rng, True), 0


def evaluate(
    source: str,
    readings: int = 1000,
    comparisons: int = 500,
    batch: int = 50,
    progress: bool = False,
    kv_cache_dtype: str | None = None,
) -> dict:
    """Exact match on pictures of held-out digits, by generation.

    A comparison counts when the picture named is the right one. With `kv_cache_dtype="int8"` the caches are in 8 bits.

    Returns:
        {"readings": …, "digits": {1: …, …}, "comparisons": …, "split": share of pictures with more than one tile}.
    """
    from tqdm import tqdm

    from smolvlm_jax import SmolVLMProcessor, load, resolve
    from smolvlm_jax.train import DataConfig, EvaluationConfig
    from smolvlm_jax.train.evaluate import ask

    config = EvaluationConfig("held-out", batch_size=batch, max_new_tokens=20)
    model, params = load(source)
    processor = SmolVLMProcessor.from_pretrained(resolve(source))
    tasks = list(held_out(readings, comparisons))
    hits: dict[int, list[bool]] = {kind: [] for kind in range(5)}
    split = []
    for start in tqdm(range(0, len(tasks), batch), disable=not progress, unit="batch"):
        part = tasks[start : start + batch]
        questions = [(example.messages, example.answer) for example, _ in part]
        answers = ask(model, params, processor, questions, config, DataConfig(), kv_cache_dtype=kv_cache_dtype)
        for (example, kind), answer in zip(part, answers, strict=True):
            hits[kind].append(answer.right if kind else answer.got.split(". ")[-1] == answer.wanted.split(". ")[-1])
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "make", help="write the training data", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    command.add_argument("folder", type=Path, nargs="?", default=Path("data/numbers"), help="where to write train.arrow")
    command.add_argument("--steps", type=int, default=STEPS, help="steps of training to write conversations for, 100 each")
    command.add_argument("--seed", type=int, default=0, help="other seeds give other pictures")
    command = commands.add_parser("evaluate", help="exact match on held-out digits")
    command.add_argument("--model", default="tiny")
    command.add_argument("--readings", type=int, default=1000)
    command.add_argument("--comparisons", type=int, default=500)
    command.add_argument("--kv-cache", choices=("int8",), help="keys and values in 8 bits")
    options = parser.parse_args(arguments)
    show = sys.stderr.isatty()
    try:
        if options.command == "make":
            print(f"wrote {make(options.folder, options.steps, options.seed, progress=show)}")
            return 0
        result = evaluate(options.model, options.readings, options.comparisons, progress=show, kv_cache_dtype=options.kv_cache)
    except SmolVLMError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"numbers of 1 to 4 digits read exactly: {result['readings']:.1%} of {options.readings}")
    for number, value in result["digits"].items():
        print(f"  {number} digit{'s' * (number > 1)}: {value:.1%}")
    print(f"larger of two numbers named: {result['comparisons']:.1%} of {options.comparisons}")
    print(f"pictures with more than one tile: {result['split']:.0%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
