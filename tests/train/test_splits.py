"""Which files of a directory are a split, and held-out questions that cannot be asked."""

import json
from pathlib import Path

import pytest

from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.errors import InputError
from smolvlm_jax.processing import SmolVLMProcessor
from smolvlm_jax.train.config import DataConfig, DataSource, EvaluationConfig
from smolvlm_jax.train.evaluate import check_tasks, held_out
from smolvlm_jax.train.records import open_records


def folder(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps({"prompt": "?", "answer": name}) + "\n")
    return path


def answers(records) -> list[str]:
    return [records[n][0]["answer"] for n in range(len(records))]


@pytest.mark.parametrize(
    "form", ["coco_{}.jsonl", "{}-00000-of-00001.jsonl", "coco.{}2017.jsonl", "{}/a.jsonl", "COCO{}.ndjson"]
)
@pytest.mark.parametrize(
    ("train", "held", "test"), [("train", "val", "test"), ("training", "dev", "eval"), ("Train", "Validation", "Test")]
)
def test_splits_are_words_of_the_names(tmp_path, form, train, held, test):
    names = {"train": form.format(train), "validation": form.format(held), "test": form.format(test)}
    path = folder(tmp_path, *names.values())
    assert answers(open_records(str(path))) == [names["train"]]
    for split, name in names.items():
        assert answers(open_records(DataSource(str(path), split=split))) == [name]
    (task,) = held_out(EvaluationConfig(str(path)))
    assert task[1] == names["validation"]
    (task,) = held_out(EvaluationConfig(str(path), split="test"))
    assert task[1] == names["test"]


def test_names_of_other_splits_and_folders_without_any(tmp_path):
    path = folder(tmp_path / "a", "train.jsonl", "minival.jsonl", "train/more.jsonl")
    assert answers(open_records(DataSource(str(path), split="minival"))) == ["minival.jsonl"]
    assert answers(open_records(str(folder(tmp_path / "b", "latest.jsonl", "contest.jsonl")))) == [
        "contest.jsonl",
        "latest.jsonl",
    ]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("coco_val.jsonl", "coco_test.jsonl"), r"no split train; it has validation, test \(.*coco_test\.jsonl"),
        (("coco.jsonl", "coco_val.jsonl"), r"split validation, and coco\.jsonl, whose names say no split"),
        (("train.jsonl", "extra.jsonl"), r"split train, and extra\.jsonl"),
        (("train_val.jsonl", "test.jsonl"), r"train_val\.jsonl speaks of several splits, train and validation"),
    ],
)
def test_folders_that_leave_it_open_are_refused(tmp_path, names, words):
    with pytest.raises(InputError, match=words):
        open_records(str(folder(tmp_path, *names)))


@pytest.fixture
def asked(tmp_path):
    root = Path(__file__).parents[2] / "examples"
    ask_for = lambda name: {"prompt": "What number is written here?", "image": str(root / name), "answer": "4207"}
    rows = [ask_for("number.png"), ask_for("gone.png"), {"prompt": "word " * 2000, "answer": "1"}]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, data = EvaluationConfig(str(tmp_path / "held.jsonl"), max_new_tokens=8), DataConfig()
    return held_out(config), SmolVLMProcessor.from_pretrained(resolve("tiny")), config, data


def test_held_out_pictures_that_are_missing_are_told(asked):
    tasks, processor, _, data = asked
    gone, long = check_tasks(tasks, processor, data, 1000)
    assert gone.startswith("question 2: ") and "gone.png" in gone
    assert long.startswith("question 3: ") and "there is room for 1000" in long


@pytest.mark.thorough
def test_questions_that_cannot_be_asked_are_answered_wrongly(asked):
    from smolvlm_jax import load
    from smolvlm_jax.train.evaluate import ask

    tasks, processor, config, data = asked
    model, params = load("tiny")
    found = ask(model, params, processor, tasks, config, data)
    assert [answer.right for answer in found] == [True, False, False]
    assert found[0].error is None and "gone.png" in found[1].error and "room for" in found[2].error


@pytest.mark.parametrize(
    "line", ['{"prompt": "?", ', '{"prompt": "?"}', '{"messages": [{"role": "assistant", "content": "1"}]}']
)
def test_a_held_out_record_that_asks_nothing_is_named_with_what_to_do(tmp_path, line):
    good = json.dumps({"prompt": "?", "answer": "!"})
    (tmp_path / "held.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(InputError, match=r"^evaluation data, held\.jsonl:2: .*; correct it, or take it out of the file: "):
        held_out(EvaluationConfig(str(tmp_path / "held.jsonl")))
    assert len(held_out(EvaluationConfig(str(tmp_path / "held.jsonl"), samples=1))) == 1
