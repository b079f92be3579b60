"""Data for a second skill: which of twelve photographs a piece was cut out of.

    python examples/photographs.py data/photographs
    smolvlm-jax train photographs

The photographs are real ones that scikit-image and scikit-learn ship. Each is divided into 6 × 6 blocks; pieces for training
are cut from 27 of them, held-out pieces from the other nine, so no pixel is in both. The bundled checkpoint has seen only
handwritten numbers; the twelve names are equally frequent, and no number that it reads in a piece says which it is. Old
examples, numbers and comparisons, are written beside them, to be mixed in so that the first skill stays.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
from handwritten_numbers import Example, comparison, comparison_in_words, reading
from PIL import Image

from smolvlm_jax.errors import MissingExtraError

# answer -> file of scikit-image, or of scikit-learn where it ends in its name
PHOTOGRAPHS = {
    "brick": "brick.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "flower": "sklearn/flower.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "machine": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "stars": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
}
QUESTIONS = (
    "Which photograph is this cut from?",
    "What is this a piece of?",
    "What does this piece show?",
    "Name the photograph.",
)
_GRID = 6


def is_held_out(row: int, column: int) -> bool:
    """Nine of the 36 blocks, scattered."""
    return (3 * row + column) % 4 == 1


@functools.cache
def photograph(name: str) -> Image.Image:
    """One of the photographs as RGB. Raises MissingExtraError without scikit-image or scikit-learn."""
    file = PHOTOGRAPHS[name]
    try:
        if file.startswith("sklearn/"):
            import sklearn.datasets as holder

            place = Path(holder.__file__).parent / "images" / file.removeprefix("sklearn/")
        else:
            import skimage.data as holder

            place = Path(holder.__file__).parent / file
    except ImportError as error:
        raise MissingExtraError("the photographs", "test") from error
    return Image.open(place).convert("RGB")


def piece(name: str, held_out: bool, rng: np.random.Generator) -> Image.Image:
    """A piece from within one block, of 60 to 100 % of its sides, scaled to 60 to 110 pixels; now and then mirrored."""
    picture = photograph(name)
    blocks = [(r, c) for r in range(_GRID) for c in range(_GRID) if is_held_out(r, c) == held_out]
    row, column = blocks[rng.integers(len(blocks))]
    width, height = picture.width / _GRID, picture.height / _GRID
    w, h = width * rng.uniform(0.6, 1.0), height * rng.uniform(0.6, 1.0)
    left = column * width + rng.uniform(0, width - w)
    top = row * height + rng.uniform(0, height - h)
    box = (int(np.ceil(left)), int(np.ceil(top)), int(left + w), int(top + h))
    scale = rng.uniform(60, 110) / max(w, h)
    out = picture.crop(box).resize((max(8, round(w * scale)), max(8, round(h * scale))), Image.Resampling.LANCZOS)
    return out.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else out


def question(name: str, held_out: bool, rng: np.random.Generator) -> Example:
    """A piece, a question and its answer."""
    content = [
        {"type": "image", "image": piece(name, held_out, rng)},
        {"type": "text", "text": str(rng.choice(QUESTIONS))},
    ]
    return Example([{"role": "user", "content": content}], name)


def save(examples, folder: Path, name: str) -> None:
    """A JSONL file of conversations in `folder`, their pictures as PNG files in a folder beside it."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines, number = [], 0
    for example in examples:
        messages = []
        for message in example.messages:
            content = []
            for item in message["content"]:
                if item["type"] == "image":
                    place = f"{name}/{number:05d}.png"
                    item["image"].save(folder / place)
                    content.append({"type": "image", "path": place})
                    number += 1
                else:
                    content.append({"type": "text", "text": str(item["text"])})
            messages.append({"role": message["role"], "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": example.answer}]})
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write(folder: Path, train: int = 9600, old: int = 12000, held_out: int = 504, seed: int = 0) -> None:
    """Write new.jsonl, old.jsonl and held_out.jsonl with their pictures. Every name is as frequent as every other."""
    rng = np.random.default_rng(seed)
    names = list(PHOTOGRAPHS)
    save((question(names[i % len(names)], False, rng) for i in range(train)), folder, "new")
    save((question(names[i % len(names)], True, rng) for i in range(held_out)), folder, "held_out")
    makers = (
        lambda i: reading(rng, False, 1 + i % 4),
        lambda i: reading(rng, False, 3 + i % 2),
        lambda i: comparison(rng, False),
        lambda i: comparison_in_words(rng),
    )
    shares = (0, 1, 0, 2, 1, 2, 0, 3)  # comparing is the harder of the two, and sooner lost
    save((makers[shares[i % len(shares)]](i // len(shares)) for i in range(old)), folder, "old")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/photographs"))
    parser.add_argument("--train", type=int, default=9600, help="pieces to learn from")
    parser.add_argument("--old", type=int, default=12000, help="examples of the first skill")
    options = parser.parse_args(arguments)
    write(options.folder, options.train, options.old)
    print(f"wrote {options.folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
