"""What a job says that its user would not see in the answers: each once, and only where it is so."""

import json
import re
from collections import Counter

import batch_corpus as corpus
import pytest

from smolvlm_jax.batch.remarks import like_settings
from smolvlm_jax.records.columns import ANSWERS, LEARNED, UNUSED
from smolvlm_jax.records.record import FIELDS, check_names, record_from
from smolvlm_jax.records.request import SETTINGS as SETTINGS_OF_RECORDS


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pictures_beside_records_are_read_or_counted(command, tmp_path, count):
    folder = tmp_path / "in"
    folder.mkdir()
    names = corpus.pictures(folder, 3)
    asked = [{"prompt": "?", "step": 0}, *({"prompt": "?", "image": f"./{name}"} for name in names[:count])]
    write(folder / "metrics.jsonl", asked)
    left = Counter("." + name.rpartition(".")[2] for name in names[count:])
    code, summary, err = command(folder, tmp_path / "out")
    assert code == 0 and summary["unread_files"] == left
    said = [line for line in err.splitlines() if "names these files" in line]
    assert len(said) == (count < 3) and all(f"{number} {ending}" in said[0] for ending, number in left.items())
    assert ("--source media reads the pictures" in err) == (not count)
    if not count:
        code, summary, err = command(folder, tmp_path / "media", "--source", "media", "--prompt", "?")
        assert code == 0 and summary["records"] == 3 and summary["unread_files"] == {".jsonl": 1}
        assert "not read: 1 .jsonl" in err


SETTINGS = [
    ({"temperature": 0.7}, ["temperature"]),
    ({"top_k": 5, "top_p": 0.5, "seed": 3}, ["seed", "top_k", "top_p"]),
    ({"temperature": 0.7, "do_sample": True}, []),
    ({"temperature": 0.7, "do_sample": False}, []),
    ({"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.1}, []),
    ({"body": {"prompt": "?", "temperature": 0.7, "top_p": 0.5}}, []),
]


@pytest.mark.parametrize(("settings", "idle"), SETTINGS)
def test_settings_of_records_without_effect_are_named_once(command, tmp_path, settings, idle):
    asked = {} if "body" in settings else {"prompt": "?"}
    source = write(tmp_path / "in.jsonl", [*[{**asked, **settings}] * 3, {"prompt": "?"}])
    code, _, err = command(source, tmp_path / "a")
    said = [line for line in err.splitlines() if "without effect" in line]
    assert code == 0 and len(said) == bool(idle) and all(f"{name} of 3 records" in said[0] for name in idle)
    assert "without effect" not in command(source, tmp_path / "b", "--do-sample")[2]
    assert command(source, tmp_path / "c", "--quiet")[2] == ""


@pytest.mark.parametrize("nothing", [{"image": None}, {"images": []}, {}])
def test_records_without_a_picture_are_counted_where_others_have_one_in_a_column(command, tmp_path, nothing):
    (name,) = corpus.pictures(tmp_path, 1)
    source = write(tmp_path / "in.jsonl", [{"prompt": "?", "image": name}, *[{"prompt": "?", **nothing}] * 2])
    code, summary, err = command(source, tmp_path / "a")
    assert code == 0 and summary["errors"] == 0 and err.count("2 records have no picture or video, and 1 have one") == 1
    for number, records in enumerate(([{"prompt": "?", **nothing}], [{"prompt": "?", "image": name}])):
        source = write(tmp_path / "other.jsonl", records)
        assert "no picture or video" not in command(source, tmp_path / f"other{number}")[2]


def test_a_prompt_that_no_record_needs_is_named_and_an_empty_one_is_none(command, tmp_path):
    own, without = {"prompt": "What?"}, {"id": 7, "system": "Be brief."}
    source = write(tmp_path / "own.jsonl", [own, {"messages": [{"role": "user", "content": "?"}]}])
    assert command(source, tmp_path / "a", "--prompt", "Why?")[2].count("--prompt was not used: each of the 2 records") == 1
    assert command(source, tmp_path / "b")[2] == ""
    both = write(tmp_path / "both.jsonl", [own, without])
    assert "not used" not in command(both, tmp_path / "c", "--prompt", "Why?")[2]
    code, summary, _ = command(both, tmp_path / "d", "--prompt", "")
    assert code == 1 and summary["errors"] == 1 and "no --prompt" in summary["first_errors"][0]["error"]
    (tmp_path / "pictures").mkdir()
    corpus.pictures(tmp_path / "pictures", 1)
    code, _, err = command(tmp_path / "pictures", tmp_path / "e", "--prompt", "")
    assert code == 2 and "needs a question" in err


@pytest.mark.parametrize("name", sorted({*FIELDS, *SETTINGS_OF_RECORDS, *ANSWERS} - {UNUSED}))
@pytest.mark.parametrize("spelt", [lambda name: name + "x", lambda name: name.title().replace("_", "")])
def test_what_the_error_of_a_misspelt_column_advises_is_accepted(name, spelt):
    wrong = spelt(name)
    record = {**({"prompt": "?"} if name != "prompt" else {"question": "?"}), wrong: "5"}
    error = record_from(record, 1).error or ""
    for ours, column in re.findall(r"--column (\w+)=(\w+)", error):
        assert column == wrong
        check_names([(ours, column)])
        assert "nothing reads" not in (record_from({**record, wrong: 5}, 1, columns=((ours, column),)).error or "")
    for ours, column in re.findall(r"\[\[(\w+), (\w+)\]\]", error):
        assert ours in LEARNED and column == wrong
    if name in SETTINGS_OF_RECORDS and wrong == name + "x" and len(name) > 4:
        assert "--column " in error.partition("leave it out")[0]


OF_OTHERS = [
    "sampling_params", "generation_config", "min_new_tokens", "logprobs", "n", "num_beams", "max_length", "stop_strings",
    "max_tiles", "do_image_splitting", "pages", "prompts", "questions", "system_prompt", "numBeams",
]  # fmt: skip


@pytest.mark.parametrize("keep", [(), ("--keep", "none")])
def test_settings_of_other_tools_are_pointed_out_once(command, tmp_path, keep):
    source = write(tmp_path / "in.jsonl", [{"prompt": "?", "label": 1, **dict.fromkeys(OF_OTHERS, 3)}] * 3)
    code, summary, err = command(source, tmp_path / "out", *keep)
    said = [line for line in err.splitlines() if "not read as settings" in line]
    assert code == 0 and len(said) == 1 and "label" not in said[0]
    assert set(OF_OTHERS) <= set(re.findall(r"\w+", said[0].partition(";")[0])) and "label" in summary["unread_columns"]


def test_nothing_that_is_read_is_taken_for_a_setting_of_another_tool():
    assert like_settings((*FIELDS, *SETTINGS_OF_RECORDS, *ANSWERS)) == []
