"""The command line, as a user meets it."""

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from PIL import Image

from smolvlm_jax import generate_cli
from smolvlm_jax.cli import _parser, main
from smolvlm_jax.errors import JobError, MediaError
from smolvlm_jax.progress import Progress
from smolvlm_jax.terminal import on_terminal, say

ROOT = Path(__file__).resolve().parents[1]
NUMBER = ROOT / "examples" / "number.png"


TINY = "smolvlm-jax: no --model is given: this is tiny, which reads handwritten numbers and little else\n"


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
    said = re.sub(r"smolvlm-jax: \[\d+:\d\d\] .*\n", "", done.stderr)  # a machine that is busy hears how far it is
    assert (done.stdout, said, done.returncode) == ("4207\n", TINY, 0)


def test_two_pictures_and_a_prompt_from_standard_input():
    pictures = ("--image", "examples/first.png", "--image", "examples/second.png")
    done = shell("generate", *pictures, "-", input="Which picture shows the larger number?\n")
    assert done.returncode == 0 and done.stdout.endswith("The second.\n"), done.stdout + done.stderr


def test_a_prompt_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait"), "utf-8"))
    assert main(["generate", "-"]) == 2
    assert capsys.readouterr().err == "smolvlm-jax: standard input is not valid utf-8: invalid continuation byte at byte 3\n"


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


def test_a_training_run_is_not_its_model(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text("{}")
    for command in (["generate", "What?"], ["batch", str(NUMBER), str(tmp_path / "out"), "--prompt", "Number?"]):
        assert main([*command, "--model", str(tmp_path)]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "is a training run" in err and "its model once it has ended" in err, err


def test_a_training_run_that_has_ended_stands_for_its_model(tmp_path):
    from smolvlm_jax import resolve

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "model").mkdir()
    assert resolve(tmp_path) == tmp_path / "model"


@pytest.mark.parametrize("emptied", (False, True))
def test_a_training_run_without_its_checkpoints_stands_for_its_model(tmp_path, emptied):
    """Its own weights, or a checkpoint that is left, come first."""
    from smolvlm_jax import resolve
    from smolvlm_jax.config import SmolVLMConfig
    from smolvlm_jax.convert.opened import open_checkpoint
    from smolvlm_jax.locate import left_model
    from smolvlm_jax.processing import SmolVLMProcessor

    run = tmp_path / "run"
    model = Path(shutil.copytree(resolve("tiny"), run / "model"))
    shutil.copy(model / "config.json", run)
    (run / "run.json").write_text("{}")
    if emptied:
        (run / "checkpoints").mkdir()
    assert resolve(run) == model and SmolVLMConfig.from_pretrained(run) == SmolVLMConfig.from_pretrained(model)
    assert (
        SmolVLMProcessor.from_pretrained(run).tokenizer.get_vocab()
        == SmolVLMProcessor.from_pretrained(model).tokenizer.get_vocab()
    )
    with open_checkpoint(run) as found, open_checkpoint(model) as wanted:
        assert found.files == wanted.files and list(found.leaves) == list(wanted.leaves)
    (run / "model.safetensors").write_bytes(b"")
    assert left_model(run) is None
    (run / "model.safetensors").unlink()
    (run / "checkpoints" / "4.damaged").mkdir(parents=True)
    assert left_model(run) is None


def test_the_help_of_every_option_shows_its_default():
    (commands,) = (action.choices for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    assert list(commands) == [
        "generate",
        "batch",
        "convert",
        "verify",
        "recipes",
        "train",
        "plan",
        "models",
        "completion",
        "doctor",
    ]
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


@pytest.mark.thorough
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
    from smolvlm_jax.generate_cli import _text_pieces

    class Bytes:
        """A tokenizer whose tokens are bytes."""

        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode("utf-8", errors="replace")

    pieces = list(_text_pieces(Bytes(), iter("né 🙂!".encode())))
    assert "".join(pieces) == "né 🙂!" and all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("name", ["answer", "log"])
def test_lines_of_progress_stay_out_of_an_answer_in_the_same_file(name, tmp_path, monkeypatch):
    """As after `> answer 2>&1`; a log of its own still gets them."""
    said = lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text()
    with open(tmp_path / "answer", "w") as answer, open(tmp_path / name, "a") as log, Progress(log_seconds=0.0) as progress:
        monkeypatch.setattr(sys, "stdout", answer)
        monkeypatch.setattr(sys, "stderr", log)
        conversation = object.__new__(generate_cli._Conversation)
        conversation._progress = progress
        conversation._writing()
        deadline = time.monotonic() + (60 if name == "log" else 0.7)
        while not said() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ("writing the answer" in (tmp_path / name).read_text()) is (name == "log")


def test_picture_modes(tmp_path, capsys):
    """A grey, a palette and a transparent copy of the picture answer alike."""
    picture = Image.open(NUMBER)
    for mode in ("L", "P", "RGBA"):
        path = tmp_path / f"{mode}.png"
        picture.convert(mode).save(path)
        assert main(["generate", "--image", str(path), "What number is written here?"]) == 0
        assert capsys.readouterr().out == "4207\n", mode


def test_the_limit_may_be_the_whole_context(capsys):
    assert main(["generate", "--max-new-tokens", "5000", "--image", str(NUMBER), "What number is written here?"]) == 0
    assert capsys.readouterr().out == "4207\n"


@pytest.mark.parametrize("stream", [None, io.TextIOWrapper(io.BytesIO())])
def test_a_standard_error_that_is_not_there(monkeypatch, capsys, stream):
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["generate", "--model", "gigantic", "What?"]) == 2
    assert sys.stderr is stream
    say("Nobody reads this.")
    assert not on_terminal()
    assert capsys.readouterr().out == ""


STREAMS = ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"]


@pytest.mark.thorough
@pytest.mark.parametrize("streams", STREAMS)
def test_commands_whose_result_is_a_file_need_no_stream(tmp_path, streams):
    """The other commands: what they say is lost, what they do is not, and the exit code tells."""
    run = lambda *words: subprocess.run(["sh", "-c", f"{shlex.join([sys.executable, '-m', 'smolvlm_jax', *words])} {streams}"])
    assert run("convert", "tiny", str(tmp_path / "orbax")).returncode == 0
    assert run("verify", "tiny", str(tmp_path / "orbax"), "--json", str(tmp_path / "same.json")).returncode == (
        full := "full" in streams
    )
    assert json.loads((tmp_path / "same.json").read_text())["same"]
    assert run("convert", "tiny", str(tmp_path / "orbax")).returncode == 2
    assert run("generate", "What?").returncode == full


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "/data/x"), 1, "No space left on device: '/data/x'"),
        (MemoryError("Unable to allocate 8 GiB"), 1, "out of memory: Unable to allocate 8 GiB"),
        (JobError("the device is gone"), 1, "the device is gone"),
        (MediaError("no picture"), 2, "no picture"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
)
def test_trouble_is_one_line_and_tells_whose_it_is(monkeypatch, capsys, error, code, words):
    def fails(options):
        raise error

    monkeypatch.setattr("smolvlm_jax.generate_cli.run", fails)
    assert main(["generate", "What?"]) == code
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == bool(words)
    if words:
        with pytest.raises(type(error)):
            main(["--traceback", "generate", "What?"])


def test_the_device_is_out_of_memory(monkeypatch, capsys):
    def fails(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying to allocate")

    monkeypatch.setattr("smolvlm_jax.generation.stream", fails)
    assert main(["generate", "What?"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "out of memory: lower --max-new-tokens" in said
