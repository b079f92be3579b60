"""What several of these tests ask, and the command that does."""

import json
from pathlib import Path

import pytest
from batch_double import Double

from smolvlm_jax.batch import run as batch_run
from smolvlm_jax.cli import main


@pytest.fixture
def lines(tmp_path) -> Path:
    """100 records: one in ten is a faulty one."""
    path = tmp_path / "records.jsonl"
    text = lambda n: "{" if n % 10 == 4 else json.dumps({"id": n, "prompt": f"{n}?", "max_new_tokens": 1 + n % 7, "label": n})
    path.write_text("".join(text(n) + "\n" for n in range(1, 101)))
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """`smolvlm-jax batch` in this process with the double for an engine: (exit code, summary or None, stderr)."""
    monkeypatch.setattr(batch_run, "_engine", lambda *args, **given: Double())
    for name in ("JOB_COMPLETION_INDEX", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments):
        code = main(["batch", *map(str, arguments), "--model", "tiny", "--workers", "0"])
        out, err = capsys.readouterr()
        if not out:
            return code, None, err
        assert out.count("\n") == 6, out
        newest = max(Path(arguments[1]).glob("_summary-*"), key=lambda path: path.stat().st_mtime_ns)
        return code, json.loads(newest.read_text()), err

    return call
