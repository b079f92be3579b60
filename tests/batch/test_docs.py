"""docs/batch.md, the README's section and the examples, executed."""

import re
import subprocess
import sys
from pathlib import Path

import batch_corpus as corpus
import pytest

from smolvlm_jax.batch.hosts import shard_of
from smolvlm_jax.batch.sinks import COLUMNS
from smolvlm_jax.cli import _parser
from smolvlm_jax.records.record import OVERRIDES

pytest.importorskip("sklearn", reason="draws handwritten digits: pip install 'smolvlm-jax[train]'")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")


def shell(line: str, folder: Path) -> str:
    """Run a command of the documentation with the interpreter of this test; returns what it prints."""
    line = re.sub(r"^smolvlm-jax", f"{sys.executable} -m smolvlm_jax", line)
    line = re.sub(r"^python examples", f"{sys.executable} {ROOT}/examples", line)
    done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, env=corpus.environment())
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.thorough
def test_every_command_and_snippet_of_the_page_runs(tmp_path):
    (records,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    (tmp_path / "records.jsonl").write_text(records)
    commands = re.findall(r"^\$ (.*)$", PAGE, re.M)
    assert len(commands) == 8
    for command in commands:
        printed = shell(command, tmp_path)
        if " score " in command:
            assert printed == "12 of 12 numbers read exactly: 100.0%\n"
    assert sorted(p.name for p in (tmp_path / "hosts").glob("part-*")) == [f"part-00000{n}.jsonl" for n in range(3)]
    assert (tmp_path / "answers" / "_replaced-1" / "part-000000.jsonl").exists()
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=corpus.environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
def test_the_readmes_numbers(tmp_path):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Batch")[1].split("\n## ")[0]
    commands = [line.split("  #")[0].strip() for line in re.findall(r"^    (\S.*)$", section, re.M)]
    extra, *commands = commands
    assert extra == 'pip install -e ".[train]"' and len(commands) == 3
    printed = [shell(command, tmp_path) for command in commands][-1]
    said = re.findall(r"# (\d+) of 1000 numbers read exactly: ([\d.]+)%$", section, re.M)[0]
    right = int(re.fullmatch(r"(\d+) of 1000 numbers read exactly: [\d.]+%\n", printed)[1])
    assert abs(right - int(said[0])) <= 3 and float(said[1]) == int(said[0]) / 10


def test_columns_and_overrides_are_described_one_by_one():
    table = PAGE.split("| column | |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.M)) == COLUMNS
    described = PAGE.split("A record may set for itself")[1].split("Keys beyond")[0]
    assert set(re.findall(r"`(\w+)`", described)) == set(OVERRIDES)


def test_the_kubernetes_manifest_is_a_job_that_our_command_line_reads():
    yaml = pytest.importorskip("yaml", reason="needs PyYAML: pip install pyyaml")
    job = yaml.safe_load((ROOT / "examples" / "gke-batch.yaml").read_text())
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    (container,) = spec["template"]["spec"]["containers"]
    program, *command = container["command"]
    options = _parser().parse_args([*command, *container["args"]])
    assert program == "smolvlm-jax" and options.command == "batch"
    assert options.num_shards == spec["completions"] == spec["parallelism"]
    assert shard_of(options.shard_index, options.num_shards, {"JOB_COMPLETION_INDEX": "7"}) == (7, 8)
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > 20
    assert [rule["action"] for rule in spec["podFailurePolicy"]["rules"]] == ["Ignore", "FailJob"]
    assert container["name"] == spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"]
