"""How the pictures beside this file were made: held-out digits, and the picture in the README.

python examples/make.py
"""

from pathlib import Path

import numpy as np
from handwritten_numbers import draw
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
PICTURES = {
    "number": ("4207", True),
    "first": ("358", True),
    "second": ("1946", False),
    "seven": ("7", False),
    "ninety": ("90", True),
}


def answer(picture: Image.Image, lines: list[tuple[str, str]]) -> Image.Image:
    """The picture above what a terminal shows."""
    font = ImageFont.load_default(15)
    scale = 2
    shown = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    page = Image.new("RGB", (760, shown.height + 40 + 26 * len(lines)), "#1e1e24")
    page.paste(shown, (20, 16))
    pen = ImageDraw.Draw(page)
    for row, (text, colour) in enumerate(lines):
        pen.text((20, shown.height + 28 + 26 * row), text, fill=colour, font=font)
    return page


if __name__ == "__main__":
    for seed, (name, (number, wide)) in enumerate(PICTURES.items()):
        draw(number, True, np.random.default_rng([11, seed]), wide=wide).save(HERE / f"{name}.png", optimize=True)
    command = '$ smolvlm-jax generate --image examples/number.png "What number is written here?"'
    picture = Image.open(HERE / "number.png")
    answer(picture, [(command, "#c8c8d0"), (PICTURES["number"][0], "#8fe388")]).save(HERE / "answer.png", optimize=True)
