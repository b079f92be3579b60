"""`benchmarks/compiled.py`: what it asks of the compilers, which are replaced here, and what it refuses."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "compiled.py"


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, and the questions that it has asked."""
    spec = importlib.util.spec_from_file_location("compiled_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compiled_benchmark", module)
    spec.loader.exec_module(module)
    asked = []
    monkeypatch.setattr(module, "plan", lambda config, notify: asked.append(config) or SimpleNamespace(programs=()))

    def run(*words):
        monkeypatch.setattr("sys.argv", ["compiled.py", *words])
        return module.main()

    return SimpleNamespace(run=run, asked=asked)


@pytest.mark.parametrize("rings", [("256:256",), ("1024:8", "2048:64"), ("2048:64", "256:256"), ("2:1",)])
def test_records_fit_the_rings(benchmark, rings):
    """Whichever comes first, with pictures in the first, whose encoder is counted."""
    assert benchmark.run("--rings", *rings) == 0
    for config, ring in zip(benchmark.asked, rings, strict=True):
        (length,), (slots,) = config.ring_lengths, config.slots
        assert f"{length}:{slots}" == ring and config.workload.prompt + config.workload.new <= length
        assert ("encode" in config.kinds) == (config.workload.tiles > 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rings", "2048"], "'2048' is not COLUMNS:SLOTS, such as 2048:64"),
        (["--rings", "2048:64:2"], "is not COLUMNS:SLOTS"),
        (["--page", "--live", "0.25"], "--page has a ring and a share of its own"),
        (["--page", "--rings", "2048:64"], "--page has a ring and a share of its own"),
        (["--only", "train", "--kv-cache", "int8"], "--only names train alone"),
        (["--json", "absent/a.json"], "--json absent/a.json: there is no such directory"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(benchmark, words, message, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.run(*words)
    assert ended.value.code == 2 and message in capsys.readouterr().err and not benchmark.asked
