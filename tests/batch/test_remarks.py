"""What a job says that its user would not see in the answers: each once, and only where it is so."""

import json
from collections import Counter

import batch_corpus as corpus
import pytest


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
