"""The command line, as a user meets it."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from smolvlm_jax.cli import _parser, main

ROOT = Path(__file__).resolve().parents[1]
NUMBER = ROOT / "examples" / "number.png"


def shell(*arguments: str, **options) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "smolvlm_jax", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        **options,
    )


def test_the_readmes_first_command_prints_the_number():
    done = shell("generate", "--image", "examples/number.png", "What number is written here?")
    assert (done.stdout, done.stderr, done.returncode) == ("4207\n", "", 0)


def test_two_pictures_and_a_prompt_from_standard_input():
    pictures = ("--image", "examples/first.png", "--image", "examples/second.png")
    done = shell("generate", *pictures, "-", input="Which picture shows the larger number?\n")
    assert done.returncode == 0 and done.stdout.endswith("The second.\n"), done.stdout + done.stderr


def test_sampling_flags(capsys):
    flags = ["--do-sample", "--temperature", "0.7", "--top-k", "3", "--top-p", "0.9", "--min-p", "0.05", "--seed", "4"]
    assert main(["generate", "--image", str(NUMBER), *flags, "--repetition-penalty", "1.1", "Read the number."]) == 0
    first = capsys.readouterr().out
    assert main(["generate", "--image", str(NUMBER), *flags, "--repetition-penalty", "1.1", "Read the number."]) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "nowhere.png", "What?"], ["nowhere.png"]),
        (["--image", "not_a_picture.png", "What?"], ["not_a_picture.png"]),
        (["--model", "gigantic", "What?"], ["gigantic", "tiny"]),
        (["--model", ".", "What?"], ["tokenizer.json"]),
        (["--max-new-tokens", "0", "What?"], ["max_new_tokens"]),
        (["--max-new-tokens", "5000", "What?"], ["prompt too long", "1024"]),
        (["--temperature", "0", "--do-sample", "What?"], ["temperature"]),
        (["word " * 3000], ["prompt too long"]),
        (["Is <image> a word?"], ["<image>"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "not_a_picture.png").write_text("I am a text.")
    assert main(["generate", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("smolvlm-jax: "), error
    assert all(word in error for word in words), error


def test_the_help_of_every_option_shows_its_default():
    (commands,) = (action.choices for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert list(commands) == ["generate", "batch", "convert", "verify", "train"]
    for name, command in commands.items():
        text = " ".join(command.format_help().split())
        options = [action for action in command._actions if action.option_strings and action.dest != "help"]
        assert text.count("(default: ") == len(options), name
    assert "logits before drawing (default: as the checkpoint says)" in commands["batch"].format_help().replace(
        "\n" + " " * 24, " "
    )


def test_no_command_is_a_usage_error():
    done = shell()
    assert done.returncode == 2 and "COMMAND" in done.stderr and "Traceback" not in done.stderr


def test_traceback_on_request(tmp_path):
    done = shell("--traceback", "generate", "--model", "gigantic", "What?")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_the_reader_may_go_away():
    done = subprocess.run(
        f"{sys.executable} -m smolvlm_jax generate --image examples/number.png 'Number?' | true",
        shell=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_converted_checkpoints_answer_the_same(tmp_path, capsys):
    """Bundled -> orbax -> Hugging Face, by the command line: the same answer each time."""
    assert main(["convert", "tiny", str(tmp_path / "orbax"), "--quiet"]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "hf"), "--to", "hf", "--quiet"]) == 0
    capsys.readouterr()
    for model in ("tiny", str(tmp_path / "orbax"), str(tmp_path / "hf")):
        assert main(["generate", "--model", model, "--image", str(NUMBER), "What number is written here?"]) == 0
        assert capsys.readouterr().out == "4207\n"


def test_a_whole_character_is_shown_at_once():
    from smolvlm_jax.cli import _text_pieces

    class Bytes:
        """A tokenizer whose tokens are bytes."""

        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    pieces = list(_text_pieces(Bytes(), iter("né 🙂!".encode())))
    assert "".join(pieces) == "né 🙂!" and all("\ufffd" not in piece for piece in pieces)


def test_picture_modes(tmp_path, capsys):
    """A grey, a palette and a transparent copy of the picture answer alike."""
    picture = Image.open(NUMBER)
    for mode in ("L", "P", "RGBA"):
        path = tmp_path / f"{mode}.png"
        picture.convert(mode).save(path)
        assert main(["generate", "--image", str(path), "What number is written here?"]) == 0
        assert capsys.readouterr().out == "4207\n", mode
