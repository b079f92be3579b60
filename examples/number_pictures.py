"""A directory of pictures of handwritten numbers, and how many of a batch job's answers to it are right.

    pip install 'smolvlm-jax[train]'  # brings the digits
    python examples/number_pictures.py make runs/numbers
    smolvlm-jax batch runs/numbers runs/answers --model tiny --prompt "What number is written here?" --max-new-tokens 20
    python examples/number_pictures.py score runs/answers

The digits are ones that occur in no training picture. The number stands in the name of its file, which is the record's id.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from handwritten_numbers import reading

from smolvlm_jax.errors import SmolVLMError


def make(folder: Path, count: int, seed: int) -> None:
    """Write `count` pictures NUMBER-OF-THE-PICTURE_WRITTEN-NUMBER.png, as many of one, two, three and four digits.

    With the default seed they are those of `handwritten_numbers.py evaluate`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        example = reading(rng, True, 1 + index % 4)
        (picture,) = (item["image"] for item in example.messages[0]["content"] if item["type"] == "image")
        picture.save(folder / f"{index:06d}_{example.answer}.png")


def score(folder: Path) -> tuple[int, int]:
    """(right answers, answers) in the JSONL parts of a job's output."""
    rows = [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines()]
    return sum(row["text"] == Path(row["id"]).stem.split("_")[1] for row in rows), len(rows)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make", help="draw the pictures")
    command.add_argument("folder", type=Path)
    command.add_argument("--count", type=int, default=1000)
    command.add_argument("--seed", type=int, default=2024)
    command = commands.add_parser("score", help="compare answers with the names of the pictures")
    command.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "make":
        try:
            make(options.folder, options.count, options.seed)
        except SmolVLMError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
    else:
        right, count = score(options.folder)
        print(f"{right} of {count} numbers read exactly: {right / max(count, 1):.1%}")


if __name__ == "__main__":
    main()
