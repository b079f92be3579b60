"""`models`, `recipes`, `doctor`, `completion`, and what the command line says of words it does not know."""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

from smolvlm_jax import doctor, generate_cli
from smolvlm_jax.cli import _parser, main
from smolvlm_jax.doctor import examine
from smolvlm_jax.dtypes import full_name
from smolvlm_jax.listings import list_models
from smolvlm_jax.locate import HUB_IDS
from smolvlm_jax.sizes import PUBLISHED
from smolvlm_jax.train.config import DataConfig, DataSource, EvaluationConfig, LoraConfig, TrainConfig
from smolvlm_jax.train.listing import recipe_keys
from smolvlm_jax.train.plain import from_dict, to_dict
from smolvlm_jax.train.recipes import load_recipe, recipe_names


def usage_error(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["genrate", "What?"], "did you mean generate?"),
        (["batch", "in", "out", "--max-tilez", "3"], "did you mean --max-tiles"),
        (["batch", "in", "out", "--max-tilez=3"], "did you mean --max-tiles"),
        (["generate", "What?", "--dtype", "float8"], "float8 is none of float32, bfloat16"),
        (["generate", "What is", "this?"], "this?: one word too many"),
        (["batch", "in"], "OUTPUT"),
    ],
)
def test_words_that_are_not_known(arguments, words, capsys):
    assert words in usage_error(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--model", "SmolVLM-256M-Instruct", "What?"], "did you mean HuggingFaceTB/SmolVLM-256M-Instruct?"),
        (["generate", "--model", "smolvlm2-2.2b-instruct", "What?"], "did you mean HuggingFaceTB/SmolVLM2-2.2B-Instruct?"),
        (["train", "lora-265m"], "did you mean lora-256m?"),
        (["train", "lora-256m", "learning_rte=1e-4"], "did you mean learning_rate"),
        (["train", "lora-256m", "lora.rnak=8"], "unknown key lora.rnak; did you mean rank?"),
        (["batch", "in.jsonl", "out"], "no model is named"),
        (["generate"], "there is no question"),
        (["generate", "-", "--chat"], "standard input holds the conversation"),
    ],
)
def test_mistakes_name_what_was_meant(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err
    assert not list(tmp_path.iterdir())


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Those below a parser, and itself."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _commands(command)


def _two_words(action: argparse.Action) -> list[list[str]]:
    """What is typed for two different values of an option, if it may have two."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return [[flag] for flag in action.option_strings]
    found = []
    for word in map(str, (*(action.choices or ()), "a", "b", 1, 2, '{"a": 1}', '{"a": 2}')):
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            value = action.type(word) if callable(action.type) else word
            if (not action.choices or value in action.choices) and value not in [known for known, _ in found]:
                found.append((value, [action.option_strings[0], word]))
    return [words for _, words in found[:2]]


def test_no_command_drops_one_of_two_values(capsys):
    """An option may be given twice if it collects, or if both say the same; any other is refused by its name."""
    seen = 0
    for command in _commands(_parser()):
        for action in command._actions:
            switch = isinstance(action, argparse.BooleanOptionalAction)
            if not action.option_strings or not (switch or (action.nargs is None and action.default is not argparse.SUPPRESS)):
                continue
            if isinstance(action, argparse._AppendAction | generate_cli._Append) or len(words := _two_words(action)) < 2:
                continue
            with pytest.raises(SystemExit) as stop:
                command.parse_args([*words[0], *words[1]])
            err = capsys.readouterr().err
            assert stop.value.code == 2 and err.count("\n") == 1, err
            assert f"{action.option_strings[0]} is given twice" in err, err
            seen += 1
    assert seen > 50


def test_values_that_are_given_twice():
    assert _parser().parse_args(["batch", "in", "out", "--dtype", "bf16", "--dtype", "bfloat16"]).dtype == "bfloat16"
    assert str(_parser().parse_args(["generate", "What?", "--min-p", "nan"]).min_p) == "nan"
    words = ["generate", "What?", "--image", "a", "--image", "b", "--top-k", "1", "--top-k", "1"]
    assert [part["path"] for part in _parser().parse_args(words).media] == ["a", "b"]
    words = ["batch", "in", "out", "--stop", "a", "--stop", "b", "--column", "unused=a", "--column", "unused=b"]
    options = _parser().parse_args(words)
    assert (options.stop, options.column) == (["a", "b"], ["unused=a", "unused=b"])


def test_a_file_system_that_takes_no_files_is_not_called_full(capsys):
    assert main(["convert", "tiny", "/proc/out", "--quiet"]) == 2
    assert "cannot write /proc/out" in capsys.readouterr().err


def test_a_directory_without_a_config(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["convert", str(tmp_path), str(tmp_path / "out"), "--quiet"]) == 2
    assert "pass --config FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--slots", "8"], "for each of the 2 rings, whose lengths are 256, 1024: for example --slots "),
        (["--ring-lengths", "64,99999"], "ring_lengths must lie"),
        (["--mesh", "data=99"], "mesh"),
    ],
)
def test_settings_are_checked_before_anything_is_written(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "What?"}\n')
    assert main(["batch", "in.jsonl", "out", "--model", "tiny", *flags]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["in.jsonl"], err


def test_a_recipe_has_to_name_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("steps: 3\n")
    assert main(["train", "recipe.yaml"]) == 2
    assert "model is not named" in capsys.readouterr().err


def test_every_published_size_has_an_id():
    assert {name.rpartition("/")[2] for name in HUB_IDS} == set(PUBLISHED)


@pytest.mark.thorough
def test_models_are_listed_with_what_they_take():
    rows = dict(list_models())
    assert set(rows) == {"tiny", *HUB_IDS}
    assert "256.5 M" in rows[HUB_IDS[0]] and "64 tokens" in rows[HUB_IDS[0]] and "bundled" in rows["tiny"]


def test_every_key_of_a_recipe_is_listed_with_a_meaning(capsys):
    keys = {key: (default, text) for key, default, text in recipe_keys()}
    assert all(text and default for default, text in keys.values())
    tops = {key.partition(".")[0].partition("[")[0] for key in keys}
    assert tops == {field.name for field in dataclasses.fields(TrainConfig)}
    for key, (default, _) in keys.items():
        if "." not in key and default != "…":
            from_dict({"steps": 1, key: yaml.safe_load(default)})
    data = DataConfig(train=(DataSource("a"),))
    printed = to_dict(TrainConfig(steps=1, data=data, evaluation=EvaluationConfig("a"), lora=LoraConfig()))
    printed["data"]["train[]"] = printed["data"]["train"][0]
    for key, (default, _) in keys.items():  # as `--print` writes them
        value = functools.reduce(lambda part, name: part[name], key.split("."), printed)
        assert default in ("…", str(value)) or yaml.safe_load(default) == value, key
    for arguments in (["recipes", "--keys"], ["train", "--list"]):
        try:
            assert main(arguments) == 0
        except SystemExit as stop:
            assert stop.code == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in [*recipe_names(), *keys])
    assert all(load_recipe(name).model for name in recipe_names())


def test_the_doctor_says_what_is_missing(monkeypatch, capsys):
    version = importlib.metadata.version
    absent = {"pyarrow", "av", "decord"}

    def found(name):
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(doctor, "_devices", lambda problems: [("cpu", "cpu", None)])
    monkeypatch.setattr(doctor, "_HARDWARE", {"an accelerator": (("/dev/null",), "tpu", "pip install it")})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    report = examine()
    assert "pyarrow" in report.extras["parquet"] and not report.extras["tensorboard"]
    assert not {"test", "dev"} & set(report.extras)
    problems = "\n".join(report.problems)
    for words in ("no library reads videos", "HF_HUB_OFFLINE", "pip install it", "av is not installed"):
        assert words in problems
    text = report.to_text()
    assert "pip install 'smolvlm-jax[parquet]'" in text and version("jax") in text
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["extras"]["parquet"] == ["pyarrow"]


def test_the_doctor_asks_jax_in_a_process_of_its_own(monkeypatch):
    problems: list[str] = []
    assert doctor._devices(problems)[0][0] == "cpu" and not problems
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    assert doctor._devices(problems) == [] and "jax cannot start" in problems[0] and "\n" not in problems[0]


def test_completion_is_a_script_of_the_shell(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0 and "--max-new-tokens" in script and "doctor" in script, done.stderr


def test_usual_names_of_dtypes():
    short = ("bf16", "torch.bfloat16", "fp32", "float", "half", "bfloat16")
    assert [full_name(name) for name in short] == ["bfloat16", "bfloat16", "float32", "float32", "float16", "bfloat16"]


@pytest.mark.thorough
def test_a_conversation_line_by_line():
    """The second question is about the picture named before it, and a mistake in between ends nothing."""
    lines = "What number is written here?\n/picture x\n/image nowhere.png\nWhat?\n/clear\n"
    lines += "/image examples/number.png\nWhat number is written here?\n"
    command = [sys.executable, "-m", "smolvlm_jax", "generate", "--model", "tiny", "--chat", "--image", "examples/number.png"]
    done = subprocess.run(command, input=lines, text=True, capture_output=True, check=False)
    assert done.stdout == "4207\n4207\n" and done.returncode == 0, done.stderr
    assert "/picture is none of" in done.stderr and "nowhere.png" in done.stderr
