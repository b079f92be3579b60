"""`verify`: equal checkpoints are equal, differences are found and named, and stages differ where the weights do."""

import json
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import convert_helpers as helpers
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from smolvlm_jax.convert.conversion import convert
from smolvlm_jax.convert.report import to_html, to_text
from smolvlm_jax.convert.stages import _distance
from smolvlm_jax.convert.verify import verify
from smolvlm_jax.errors import CheckpointError, DownloadError, InputError
from smolvlm_jax.progress import Progress


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    directory = helpers.make(tmp_path_factory.mktemp("original") / "hf")
    helpers.add_processor(directory)
    return directory


@pytest.fixture(scope="module")
def orbax(original, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("converted") / "orbax"
    convert(original, directory, quiet=True)
    return directory


def changed(original: Path, directory: Path, change) -> Path:
    """A copy of a checkpoint with some tensors changed."""
    shutil.copytree(original, directory)
    tensors = {name: value.copy() for name, value in helpers.weights(original).items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_equal_in_every_pair_of_formats(original, orbax, tmp_path):
    convert(original, tmp_path / "sharded", to="hf", max_shard_size="150KB", quiet=True)
    for a, b in ((original, orbax), (orbax, original), (original, tmp_path / "sharded"), (orbax, orbax)):
        report = verify(a, b, quiet=True)
        assert report.same
        assert {row.status for row in report.tensors} == {"equal"}
        assert len(report.tensors) == len(helpers.weights(original))
        assert report.notes == []


def test_one_bit_is_found(original, orbax, tmp_path):
    name = "model.text_model.layers.1.mlp.up_proj.weight"

    def flip(tensors):
        tensors[name].view(np.uint32)[5, 7] ^= 1

    report = verify(orbax, changed(original, tmp_path / "b", flip), quiet=True)
    assert not report.same
    rows = [row for row in report.tensors if not row.good]
    assert [(row.name, row.status, row.different, row.where) for row in rows] == [(name, "different", 1, (7, 5))]
    value = abs(float(helpers.weights(original)[name][5, 7]))
    assert 0 < rows[0].max_abs < value * 2.0**-22
    assert rows[0].mean_abs == pytest.approx(rows[0].max_abs / (96 * 48))
    assert name in to_text(report)


def test_many_differences_are_counted_and_ten_are_shown(original, tmp_path):
    def negate(tensors):
        for tensor in tensors.values():
            np.negative(tensor, out=tensor)

    report = verify(original, changed(original, tmp_path / "b", negate), quiet=True)
    lines = to_text(report).splitlines()
    bad = sum(not row.good for row in report.tensors)
    assert bad > 11 and len(lines) <= 18 and f"… {bad - 10} more tensors: --report FILE or --json FILE has all of them" in lines
    assert to_html(report).count("different") >= bad


def test_nan_is_equal_to_itself_and_to_nothing_else(original, tmp_path):
    def spoil(tensors):
        tensors["model.text_model.norm.weight"][3] = np.nan

    a = changed(original, tmp_path / "a", spoil)
    assert verify(a, a, quiet=True).same
    report = verify(a, original, quiet=True)
    (row,) = [row for row in report.tensors if not row.good]
    assert (row.different, row.where) == (1, (3,))
    assert np.isnan(row.max_abs)
    assert '"max_abs": "nan"' in json.dumps(report.to_dict())


def test_rounding_is_told_from_damage(original, tmp_path):
    convert(original, tmp_path / "bf16", dtype="bfloat16", quiet=True)
    report = verify(original, tmp_path / "bf16", quiet=True)
    assert report.same
    assert {row.status for row in report.tensors} == {"rounded"}
    assert {row.dtypes for row in report.tensors} == {("float32", "bfloat16")}

    def truncate(tensors):  # a cast that does not round
        for name, value in tensors.items():
            tensors[name] = (value.view(np.uint32) >> 16).astype(np.uint16).view(ml_dtypes.bfloat16)

    report = verify(original, changed(original, tmp_path / "cut", truncate), quiet=True)
    assert not report.same
    assert sum(row.status == "different" for row in report.tensors) > 30


def test_missing_and_misshapen_tensors(original, tmp_path):
    tied = helpers.make(tmp_path / "tied", "tied")
    report = verify(original, tied, quiet=True)
    assert ("lm_head.weight", "only in A") in {(row.name, row.status) for row in report.tensors}
    assert ("lm_head.weight", "only in B") in {(row.name, row.status) for row in verify(tied, original, quiet=True).tensors}
    assert "config tie_word_embeddings: A has False, B has True" in report.notes
    assert "tokenizer.json: only in A" in report.notes

    def widen(tensors):
        for name in ("lm_head.weight", "model.text_model.embed_tokens.weight"):
            tensors[name] = np.concatenate([tensors[name], tensors[name][:2]])

    wider = changed(original, tmp_path / "wider", widen)
    config = json.loads((wider / "config.json").read_text())
    config["text_config"]["vocab_size"] += 2
    (wider / "config.json").write_text(json.dumps(config))
    statuses = {row.name: row.status for row in verify(original, wider, quiet=True).tensors}
    assert statuses.pop("lm_head.weight") == statuses.pop("model.text_model.embed_tokens.weight") == "misshapen"
    assert set(statuses.values()) == {"equal"}
    with pytest.raises(
        InputError, match=r"^NOT the same: .* different models \(config text_config\.vocab_size: A has \d+, B has \d+\)"
    ):
        verify(original, wider, stages=True, quiet=True)


EXPECTED = [
    *[("picture", name) for name in ("tokens", "pixels", "vision embeddings", "vision layer 1", "vision layer 2")],
    *[("picture", name) for name in ("vision output", "image tokens", "text embeddings", "text layer 1", "text output")],
    *[("picture", name) for name in ("logits", "greedy tokens")],
    *[("text", name) for name in ("tokens", "text embeddings", "text layer 1", "text output", "logits", "greedy tokens")],
]


def test_stages_agree_with_transformers(original, orbax):
    report = verify(original, orbax, stages=True, quiet=True, notify=lambda line: None)
    stages = report.stages
    assert report.same
    assert stages.runs == ["A transformers", "A ours", "B ours"]
    assert [(row.prompt, row.stage) for row in stages.rows] == EXPECTED
    for row in stages.rows:
        assert row.relative["A ours"] == row.relative["B ours"]  # both have the same bits
        assert row.relative["A ours"] <= (0 if "tokens" in row.stage and row.stage != "image tokens" else 2e-5)
        if row.stage in ("tokens", "pixels"):
            assert row.relative["A ours"] == 0
    assert stages.rows[0].shape[1] > 60  # the tokenizer has a token for each letter of the question
    assert "identity" in stages.position_rule
    assert "transformers 5." in stages.position_rule


def test_stages_part_where_the_weights_do(original, orbax, tmp_path):
    for name, stage in (
        ("model.vision_model.embeddings.position_embedding.weight", ("picture", "vision embeddings")),
        ("model.vision_model.encoder.layers.1.mlp.fc2.bias", ("picture", "vision layer 2")),
        ("model.connector.modality_projection.proj.weight", ("picture", "image tokens")),
        ("model.text_model.layers.0.self_attn.o_proj.weight", ("picture", "text layer 1")),
        ("lm_head.weight", ("picture", "logits")),
    ):

        def spoil(tensors, name=name):
            tensors[name] *= 1.5

        other = changed(original, tmp_path / name, spoil)
        report = verify(orbax, other, stages=True, quiet=True, notify=lambda line: None)
        assert not report.same
        assert report.stages.runs == ["B transformers", "A ours", "B ours"]
        first = report.stages.first_parting("A ours")
        assert (first.prompt, first.stage) == stage
        assert report.stages.first_parting("B ours") is None
        assert f"A ours: parts at {stage[0]} / {stage[1]}" in to_text(report)


def test_the_position_rule_of_4_56_is_seen_at_the_first_stage(original, orbax):
    report = verify(original, orbax, stages=True, position_ids="transformers-4.56", quiet=True, notify=lambda line: None)
    assert report.stages.first_parting("A ours").stage == "vision embeddings"
    assert "4.56 and 4.57" in report.stages.position_rule


@pytest.mark.thorough
def test_stages_of_equal_models_with_nan_agree(tmp_path, monkeypatch):
    """A value that is NaN in both makes NaN of the same values in both, which is said and is no difference."""
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else real(name, *rest))

    def spoil(tensors):
        tensors["model.text_model.layers.0.mlp.down_proj.weight"][0, 0] = np.nan

    original = helpers.make(tmp_path / "a")
    for name in ("b", "c"):
        changed(original, tmp_path / name, spoil)
    report = verify(tmp_path / "b", tmp_path / "c", stages=True, quiet=True, notify=lambda line: None)
    assert report.same and to_text(report).startswith("the same: ")
    assert any("NaN or infinite; runs that have the same there agree" in note for note in report.stages.notes)
    report = verify(original, tmp_path / "c", stages=True, quiet=True, notify=lambda line: None)
    assert not report.same and report.stages.first_parting("B ours").stage == "text layer 1"


def test_values_that_are_not_finite():
    finite, nan, infinite = np.array([1.0, 2.0]), np.array([1.0, np.nan]), np.array([1.0, np.inf])
    assert _distance(nan, nan) == _distance(infinite, infinite) == 0
    assert _distance(nan, nan + 0.5) == 0.5 and _distance(finite, finite / 2) == 0.5
    assert {_distance(*pair) for pair in ((nan, finite), (finite, nan), (infinite, -infinite), (nan, infinite))} == {np.inf}


def test_stages_without_transformers_and_without_a_tokenizer(tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else real(name, *rest))
    source = helpers.make(tmp_path / "idefics3", "idefics3", "bfloat16")
    convert(source, tmp_path / "orbax", quiet=True)
    report = verify(source, tmp_path / "orbax", stages=True, quiet=True, notify=lambda line: None)
    assert report.same
    assert report.stages.runs == ["A ours", "B ours"]
    assert report.stages.tolerances == {"B ours": 1e-4}  # both are in bfloat16: nothing was rounded between them
    assert all(row.relative == {"B ours": 0.0} for row in report.stages.rows)
    assert "not installed" in " ".join(report.stages.notes)
    assert "no tokenizer" in " ".join(report.stages.notes)


def test_rounded_weights_are_judged_by_the_coarser_dtype(original, tmp_path):
    convert(original, tmp_path / "bf16", dtype="bfloat16", quiet=True)
    report = verify(original, tmp_path / "bf16", stages=True, quiet=True, notify=lambda line: None)
    assert report.same
    assert report.stages.tolerances == {"A ours": 1e-4, "B ours": 1e-1}
    assert max(row.relative["B ours"] for row in report.stages.rows if row.stage == "logits") > 1e-4


def test_html_is_one_page_that_refers_to_nothing(original, orbax, tmp_path):
    other = changed(original, tmp_path / "b", lambda tensors: tensors["lm_head.weight"].__imul__(2))
    report = verify(orbax, other, stages=True, quiet=True, notify=lambda line: None)
    page = to_html(report)
    assert not re.search(r"(?:src|href)\s*=|@import|url\(", page)
    assert "NOT the same" in page
    assert "lm_head.weight" in page
    assert "position ids" in page
    svg = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    tag = "{http://www.w3.org/2000/svg}"
    lines = svg.findall(f"{tag}polyline")
    assert len(lines) == len(report.stages.runs) - 1
    assert all(len(line.get("points").split()) == len(report.stages.rows) for line in lines)
    assert len(svg.findall(f"{tag}circle")) == 1  # A ours parts from B's reference; B ours does not
    assert "<svg" not in to_html(verify(orbax, orbax, quiet=True))


def test_the_command(original, orbax, tmp_path, capsys):
    report, data = tmp_path / "report.html", tmp_path / "report.json"
    assert helpers.call("verify", original, orbax, "--report", report, "--json", data) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"the same: {original} (A) and {orbax} (B)\n")
    assert "bit-equal" in said.out
    assert report.read_text().startswith("<!doctype html>")
    assert json.loads(data.read_text())["same"] is True
    other = changed(original, tmp_path / "b", lambda tensors: tensors["lm_head.weight"].__imul__(2))
    assert helpers.call("verify", original, other, "--json", "-") == 1
    assert json.loads(capsys.readouterr().out)["same"] is False
    assert helpers.call("verify", original, other, "--quiet") == 1
    assert capsys.readouterr() == ("", "")
    with pytest.raises(InputError, match="cannot write"):
        helpers.call("verify", original, orbax, "--report", tmp_path / "no" / "where.html")
    with pytest.raises(CheckpointError):
        helpers.call("verify", original, tmp_path / "absent")


@pytest.mark.parametrize(
    "error", [DownloadError("no answer"), PermissionError(13, "Permission denied"), MemoryError()], ids=repr
)
def test_what_cannot_be_compared_does_not_differ(original, monkeypatch, error):
    """Exit code 1 would say that the two differ."""

    def fails(*args, **options):
        raise error

    monkeypatch.setattr("smolvlm_jax.convert.verify.verify", fails)
    with pytest.raises(CheckpointError) as caught:
        helpers.call("verify", original, original)
    assert caught.value.exit_code == 2


def test_progress_is_for_terminals(original, tmp_path, capsys, monkeypatch):
    assert helpers.call("convert", original, tmp_path / "a") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out == f"{tmp_path / 'a'}: {len(helpers.weights(original))} tensors, 0.000 GB, as orbax\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert helpers.call("convert", original, tmp_path / "b", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    drawn = []
    monkeypatch.setattr("smolvlm_jax.progress._TICK_SECONDS", 0.001)
    monkeypatch.setattr("smolvlm_jax.progress.draw", drawn.append)
    assert helpers.call("convert", tmp_path / "b", tmp_path / "c") == 0
    assert any(f"reading {tmp_path / 'b'}" in line for line in drawn) and drawn[-1] == ""


def test_off_a_terminal_a_long_run_says_what_it_is_doing(original, capsys, monkeypatch):
    monkeypatch.setattr("smolvlm_jax.progress._TICK_SECONDS", 0.001)
    verify(original, original, progress=Progress(log_seconds=0.001))
    said = capsys.readouterr().err
    assert "comparing the tensors" in said and said.startswith("smolvlm-jax: ")


def test_ctrl_c_says_that_nothing_was_written(original, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("smolvlm_jax.convert.conversion.open_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        helpers.call("convert", original, tmp_path / "a")
    assert capsys.readouterr().err == f"smolvlm-jax: interrupted: {tmp_path / 'a'} was not written\n"


def test_the_parsers_import_nothing_heavy():
    import subprocess

    code = (
        "import argparse, sys; from smolvlm_jax.convert.cli import add_parsers\n"
        "add_parsers(argparse.ArgumentParser().add_subparsers())\n"
        "heavy = {'jax', 'flax', 'orbax', 'torch', 'transformers', 'numpy', 'tensorstore'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
