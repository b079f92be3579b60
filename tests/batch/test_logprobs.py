"""Columns of log-probabilities: in both formats, through interruptions, of the job's identity."""

import dataclasses
import json

import numpy as np
import pytest
from batch_double import Double

from smolvlm_jax.batch import BatchConfig, run_batch
from smolvlm_jax.batch import run as batch_run
from smolvlm_jax.batch.logprobs import LOGPROBS, logprob_columns
from smolvlm_jax.batch.sinks import COLUMNS, open_sink
from smolvlm_jax.engine import SamplingParams
from smolvlm_jax.errors import InputError

VALUES = (-0.1, -2.5, -1e-9)


class Measured(Double):
    """Answers with log-probabilities where they are asked for."""

    def answer(self, request):
        assert request.params.logprobs in (0, None)
        found = tuple(float(np.float32(-0.1 * (n + 1))) for n in range(request.params.max_new_tokens))
        return dataclasses.replace(super().answer(request), logprobs=found if request.params.logprobs == 0 else None)


def test_values_are_the_shortest_decimals_of_float32():
    found = logprob_columns(LOGPROBS["tokens"], [float(np.float32(value)) for value in VALUES])
    assert found == {"mean_logprob": -0.8666667, "min_logprob": -2.5, "token_logprobs": list(VALUES)}
    assert logprob_columns(LOGPROBS["mean"], None) == {"mean_logprob": None, "min_logprob": None}
    assert logprob_columns(LOGPROBS["tokens"], [float("nan"), -1.0])["token_logprobs"] == [None, -1.0]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_job_has_the_columns_it_asked_for_and_goes_on_with_them(lines, tmp_path, monkeypatch, format):
    if format == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    monkeypatch.setattr(batch_run, "_engine", lambda *arguments, **given: Measured())
    config = BatchConfig(
        model="tiny", input=lines, output=tmp_path / "out", format=format, logprobs="tokens", workers=0, quiet=True
    )
    for _ in range(2):  # the second time every part is there
        assert run_batch(config)["complete"]
    (part,) = (tmp_path / "out").glob("part-*")
    rows = list(open_sink(format, "tokens").read(part))

    def expected(row, names):
        """The records' own columns come last; a line that cannot be read has none."""
        return (*names, "label", "other_columns") if format == "parquet" else (*names, *([] if row["error"] else ["label"]))

    for row in rows:
        assert tuple(row) == expected(row, (*COLUMNS, *LOGPROBS["tokens"]))
        if row["error"]:
            assert row["mean_logprob"] is row["min_logprob"] is row["token_logprobs"] is None
        else:
            want = [np.float32(-0.1 * (n + 1)) for n in range(row["new_tokens"])]
            assert [np.float32(value) for value in row["token_logprobs"]] == want
            assert np.float32(row["min_logprob"]) == min(want) and row["mean_logprob"] == pytest.approx(np.mean(want), abs=1e-6)
    assert json.loads((tmp_path / "out" / "_manifest.json").read_text())["logprobs"] == "tokens"
    with pytest.raises(InputError, match="logprobs was 'tokens', is 'mean'"):
        run_batch(dataclasses.replace(config, logprobs="mean"))
    plain = dataclasses.replace(config, output=tmp_path / "plain", logprobs=None)
    run_batch(plain)
    assert "logprobs" not in (tmp_path / "plain" / "_manifest.json").read_text()
    (part,) = (tmp_path / "plain").glob("part-*")
    assert all(tuple(row) == expected(row, COLUMNS) for row in open_sink(format).read(part))


def test_rows_of_a_killed_run_are_taken_over(lines, tmp_path):
    from smolvlm_jax.batch.parts import Part

    sink = open_sink("jsonl", "mean")
    row = dict.fromkeys(COLUMNS, 1) | logprob_columns(LOGPROBS["mean"], [-0.5])
    first = Part.open(tmp_path, 0, sink)
    first.add(3, row)
    first.add(4, dict.fromkeys(COLUMNS, 1))  # not a row of this job
    first.close()
    assert Part.open(tmp_path, 0, sink).taken_over == {3: row}


def test_what_makes_no_sense_is_refused(tmp_path):
    job = {"model": "tiny", "input": tmp_path, "output": tmp_path / "out"}
    for wrong in ("median", "", "Mean"):
        with pytest.raises(InputError, match="mean, tokens"):
            BatchConfig(**job, logprobs=wrong)
    with pytest.raises(InputError, match=r"sampling\.logprobs"):
        BatchConfig(**job, sampling=SamplingParams(logprobs=3))
