"""The job around the engine: what it asks, what it writes, how it stops, what it returns."""

import argparse
import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import batch_corpus as corpus
import pytest
from batch_double import Double, batch, run
from PIL import Image

from smolvlm_jax.batch import BatchConfig, PictureOptions, run_batch
from smolvlm_jax.batch.job import EMPTY, Shard
from smolvlm_jax.batch.sinks import open_sink
from smolvlm_jax.checkpoint import resolve
from smolvlm_jax.cli import _parser, main
from smolvlm_jax.engine import Result, SamplingParams
from smolvlm_jax.engine.loading import is_docling
from smolvlm_jax.errors import InputError

TINY = str(resolve("tiny"))
ROOT = Path(__file__).resolve().parents[2]


def test_one_row_for_each_record_in_the_order_of_the_input(lines, tmp_path):
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        summary = run(lines, out, workers=workers)
        rows = corpus.rows_of(out)
        assert [row["id"] for row in rows] == list(range(1, 101))
        assert [row["id"] for row in rows if row["error"]] == list(range(4, 101, 10))
        assert all(row["new_tokens"] == 1 + row["id"] % 7 for row in rows if not row["error"])
        assert sorted(os.listdir(out)) == [f"part-{n:06d}.jsonl" for n in range(10)]
        want = {
            "complete": True,
            "records": 100,
            "answers": 90,
            "errors": 10,
            "parts": 10,
            "error_share": 0.1,
            "new_records": 100,
            "unread_columns": ["label"],
        }
        assert {name: summary[name] for name in want} == want
        assert summary["finish_reasons"] == {"error": 10, "length": 90} and summary["device_idle_share"] == 0.25
        assert summary["first_errors"][0]["id"] == 4 and "not valid JSON" in summary["first_errors"][0]["error"]
        assert summary["new_tokens"] == sum(row["new_tokens"] for row in rows)
    assert corpus.multiset(rows) == corpus.multiset(corpus.rows_of(tmp_path / "out0"))


def test_shards_together_are_the_whole(lines, tmp_path):
    run(lines, tmp_path / "one")
    counts = Counter()
    for index in range(3):
        summary = run(lines, tmp_path / "three", shard=Shard(index, 3, 10))
        counts.update(records=summary["records"], parts=summary["parts"])
    assert counts["records"] == 100 and counts["parts"] == 10
    assert sorted(os.listdir(tmp_path / "three")) == sorted(os.listdir(tmp_path / "one"))
    for part in os.listdir(tmp_path / "one"):  # the double's timing is fixed: equal to the byte
        assert (tmp_path / "three" / part).read_bytes() == (tmp_path / "one" / part).read_bytes()


@pytest.mark.parametrize("size", [7, 1000])
def test_progress_ends_at_the_whole(lines, tmp_path, size):
    out = tmp_path / "out"
    with batch(lines, out, Double(after=lambda count: count == 30 and job.stop()), Shard(size=size)) as job:
        job.run()
    assert 0.2 < job.tally._share < 0.5 or size == 1000
    for _ in range(2):  # the second time all is there already
        with batch(lines, out, shard=Shard(size=size)) as job:
            job.run()
        assert job.tally._share == pytest.approx(1)


def test_parquet_out_has_the_same_rows(lines, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    run(lines, tmp_path / "jsonl")
    summary = run(lines, tmp_path / "parquet", format="parquet")
    sink = open_sink("parquet")
    rows = [row for part in sorted((tmp_path / "parquet").iterdir()) for row in sink.read(part)]
    assert rows == [{**row, "id": str(row["id"])} for row in corpus.rows_of(tmp_path / "jsonl")]
    again = run(lines, tmp_path / "parquet", format="parquet")
    assert (again["records"], again["errors"], again["new_records"]) == (100, summary["errors"], 0)


def test_a_finished_job_needs_no_engine(lines, tmp_path):
    first = run(lines, tmp_path / "out")

    class Never:
        def generate(self, requests):
            raise AssertionError("nothing is left to answer")

    again = run(lines, tmp_path / "out", engine=Never())
    assert again["new_records"] == 0
    assert {k: again[k] for k in ("records", "errors", "parts")} == {k: first[k] for k in ("records", "errors", "parts")}


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_damaged_part_is_named(lines, tmp_path, format):
    if format == "parquet":
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    run(lines, tmp_path / "out", format=format)
    part = tmp_path / "out" / f"part-000003.{format}"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"part-000003.*remove it"):
        run(lines, tmp_path / "out", format=format)
    part.unlink()
    assert run(lines, tmp_path / "out", format=format)["new_records"] == 10


def test_a_part_with_lines_that_are_no_rows_is_damaged(lines, tmp_path):
    run(lines, tmp_path / "out")
    for line in ("[]", "5", "null", "{}", '{"finish_reason": []}'):
        (tmp_path / "out" / "part-000003.jsonl").write_text(line + "\n")
        with pytest.raises(InputError, match=r"part-000003.*remove it"):
            run(lines, tmp_path / "out")


def test_what_an_engine_answered_before_it_failed_is_kept(lines, tmp_path):
    out = tmp_path / "out"

    def fail(count):
        if count == 25:
            raise MemoryError("the device is full")

    broken = Double(after=fail)
    with pytest.raises(MemoryError):
        run(lines, out, engine=broken)
    second = Double()
    summary = run(lines, out, engine=second)
    assert summary["records"] == 100 and len(corpus.rows_of(out)) == 100
    assert not set(broken.seen) & set(second.seen), "a finished row is not asked for again"
    assert len(broken.seen) + len(second.seen) == 90


def test_an_answer_without_a_token_is_an_error_and_a_space_is_not(lines, tmp_path):
    class Silent(Double):
        def answer(self, request):
            ids = {0: (), 1: (7,)}.get(request.id[1] % 2)
            reason = "length" if request.id[1] % 4 < 2 else "stop"
            return Result(request.id, "", None, reason, 5, len(ids), 0, ids, 0.0)

    run(lines, tmp_path / "out", engine=Silent())
    for place, row in enumerate(corpus.rows_of(tmp_path / "out")):
        if row["id"] % 10 != 4:
            silent = place % 10 % 4 == 0
            assert (row["error"] == EMPTY, row["finish_reason"] == "error", row["text"] is None) == (silent,) * 3


def test_stopping_answers_what_is_in_flight_and_no_more(lines, tmp_path):
    out = tmp_path / "out"
    stop = lambda count: job.stop() if count == 23 else None
    with batch(lines, out, Double(after=stop)) as job:
        summary = job.run()
    assert not summary["complete"] and summary["answers"] in (23, 24)
    assert len(list(out.glob("part-*"))) == 2 and len(list(out.glob(".part-*"))) == 1
    assert run(lines, out)["records"] == 100
    assert len(corpus.rows_of(out)) == 100 and not list(out.glob(".*"))


def test_an_empty_input_is_a_finished_job(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n \n")
    assert run(tmp_path / "none.jsonl", tmp_path / "out")["records"] == 0


# ---- the command


def test_the_exit_code_tells_of_errors(command, lines, tmp_path):
    code, summary, err = command(lines, tmp_path / "a", "--shard-size", "10")
    assert code == 1 and summary["errors"] == 10 and "10 of 100 records have an error" in err
    code, again, err = command(lines, tmp_path / "a", "--shard-size", "10", "--max-error-rate", "0.1")
    assert code == 0 and again["records"] == 100 and again["new_records"] == 0 and err == ""
    assert json.loads((tmp_path / "a" / "_summary-0-of-1.json").read_text()) == again


def test_files_that_are_not_read_are_named_at_the_start_and_in_the_summary(command, tmp_path):
    (tmp_path / "in").mkdir()
    corpus.pictures(tmp_path / "in", 2)
    for name in ("scan.svg", "a.jxl", "b.JXL"):
        (tmp_path / "in" / name).write_text("x")
    code, summary, err = command(tmp_path / "in", tmp_path / "out", "--prompt", "?")
    assert code == 0 and summary["records"] == 2 and summary["unread_files"] == {".jxl": 2, ".svg": 1}
    assert "kinds that are not read: 2 .jxl, 1 .svg" in err and err.count("\n") == 1
    code, _, err = command(tmp_path / "in", tmp_path / "out", "--prompt", "?", "--background", "white")
    assert code == 2 and "pictures.background was None, is 'white'" in err


def test_a_restart_may_have_other_hosts_but_no_other_question(command, lines, tmp_path):
    flags = (lines, tmp_path / "a", "--shard-size", "10", "--max-error-rate", "1")
    _, summary, err = command(*flags, "--num-shards", "2", "--shard-index", "0")
    assert (summary["records"], summary["missing_parts"]) == (50, 5) and "not there yet" not in err
    _, summary, err = command(*flags, "--num-shards", "3", "--shard-index", "1")  # by mistake
    assert summary["missing_parts"] == 3 and "3 parts of the input are not there yet (part-000003 is the first)" in err
    _, summary, err = command(*flags)
    assert (summary["records"], summary["missing_parts"]) == (100, 0) and "not there yet" not in err
    assert sorted(p.name for p in (tmp_path / "a").glob("_summary*")) == [
        "_summary-0-of-1.json",
        "_summary-0-of-2.json",
        "_summary-1-of-3.json",
    ]
    code, _, err = command(*flags, "--temperature", "0.5", "--do-sample")
    assert code == 2 and "sampling.do_sample was False, is True" in err and "sampling.temperature was 1.0, is 0.5" in err
    with open(lines, "a") as file:
        file.write('{"prompt": "more"}\n')
    code, _, err = command(*flags)
    assert code == 2 and "records.jsonl has grown from" in err and "files and an OUTPUT of their own" in err
    code, summary, err = command(*flags, "--force")
    assert code == 0 and summary["records"] == 101 and "_replaced-1" in err
    assert len(corpus.rows_of(tmp_path / "a" / "_replaced-1")) == 100


def test_what_changes_answers_is_recorded_where_it_is_given(command, lines, tmp_path):
    flags = (lines, tmp_path / "a", "--shard-size", "10", "--max-error-rate", "0.1")
    command(*flags)
    assert "kv_cache" not in json.loads((tmp_path / "a/_manifest.json").read_text())  # as manifests were written before
    assert command(*flags)[0] == 0
    code, _, err = command(*flags, "--kv-cache", "int8")
    assert code == 2 and "kv_cache was None, is 'int8'" in err
    assert command(*flags, "--kv-cache", "int8", "--force")[0] == 0 == command(*flags, "--kv-cache", "int8")[0]
    code, _, err = command(*flags)
    assert code == 2 and "kv_cache was 'int8', is None" in err


def test_a_seed_that_nothing_draws_by_gets_a_remark(command, lines, tmp_path):
    flags = (lines, tmp_path / "a", "--shard-size", "10", "--max-error-rate", "0.1", "--seed", "7")
    assert command(*flags)[2].count("seed: without effect on records that do not set do_sample") == 1
    assert "without effect" not in command(*flags, "--do-sample", "--force")[2]


def test_parquet_in_and_out(command, tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'smolvlm-jax[parquet]'")
    import pyarrow as pa
    import pyarrow.parquet

    names = corpus.pictures(tmp_path, 9)
    files = [(tmp_path / name).read_bytes() for name in names]
    pyarrow.parquet.write_table(pa.table({"name": names, "jpg": files, "junk": range(9)}), tmp_path / "in.parquet")
    flags = ("--column", "id=name", "--column", "image=jpg", "--prompt", "What?", "--format", "parquet", "--shard-size", "4")
    code, summary, err = command(tmp_path / "in.parquet", tmp_path / "out", *flags)
    assert code == 0 and summary["parts"] == 3 and summary["tiles"] > 9, err
    found = pyarrow.parquet.read_table(tmp_path / "out").to_pylist()
    command(tmp_path / "*.*g", tmp_path / "media", "--prompt", "What?", "--source", "media")
    by_name = {row["id"]: row["text"].split(", seed")[0] for row in corpus.rows_of(tmp_path / "media")}
    assert [row["id"] for row in found] == names
    assert {row["id"]: row["text"].split(", seed")[0] for row in found} == by_name, "bytes and files are the same pictures"


def test_an_output_that_is_named_like_a_file_of_another_kind_gets_a_remark(command, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    for name, words in (
        ("answers.parquet", "answers.parquet) is a directory, with parts of the answers in jsonl; --format parquet writes"),
        ("answers.CSV", "answers.CSV) is a directory, with parts of the answers in jsonl; --format is one of jsonl, parquet"),
        ("answers.jsonl", None),
        ("answers.v2", None),
    ):
        code, _, said = command(tmp_path / "in.jsonl", tmp_path / name)
        assert code == 0 and (words in said if words else "is a directory" not in said), said


def test_answers_are_never_input(command, lines, tmp_path):
    """Where the parts would be found by the next run, which would refuse to go on."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "a.jsonl").write_bytes(lines.read_bytes())
    flags = ("--max-error-rate", "1", "--prompt", "?")
    for source, out in (("in", "in"), ("in/*.jsonl", "in"), ("in/**/*.jsonl", "in/deep")):
        code, _, err = command(tmp_path / source, tmp_path / out, *flags)
        assert code == 2 and "is where INPUT is read from" in err and err.count("\n") == 1, (source, out)
    for source, out in (("in", "in/deep"), ("in/*.jsonl", "in/out"), ("in/a.jsonl", "in")):
        for new in (100, 0):
            code, summary, _ = command(tmp_path / source, tmp_path / out, *flags)
            assert code == 0 and summary["new_records"] == new, (source, out)


def test_launchers_are_asked(command, lines, tmp_path, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    code, summary, _ = command(lines, tmp_path / "a", "--shard-size", "10", "--num-shards", "4", "--max-error-rate", "1")
    assert code == 0 and (summary["shard_index"], summary["num_shards"], summary["records"]) == (2, 4, 20)


def test_sampling_reaches_the_requests_and_follows_the_id(command, lines, tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        command(lines, tmp_path / name, "--seed", seed, "--max-error-rate", "1")
        texts.append([row["text"] for row in corpus.rows_of(tmp_path / name)])
    assert texts[0] == texts[1]
    assert all(a != c for a, c in zip(texts[0], texts[2], strict=True) if a is not None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["nowhere.jsonl", "out"], "nowhere.jsonl"),
        (["a.png", "out"], "--prompt"),
        (["records.jsonl", "a.png"], "a.png"),
        (["records.jsonl", "out", "--model", "gigantic"], "gigantic"),
        (["records.jsonl", "out", "--format", "csv"], "csv"),
        (["records.jsonl", "out", "--source", "xml"], "xml"),
        (["records.jsonl", "out", "--column", "imge=jpg"], "imge"),
        (["records.jsonl", "out", "--shard-size", "0"], "shard_size"),
        (["records.jsonl", "out", "--num-shards", "3"], "--shard-index"),
        (["records.jsonl", "out", "--max-new-tokens", "0"], "max_new_tokens"),
        (["records.jsonl", "out", "--temperature", "0"], "temperature"),
        (["records.jsonl", "out", "--max-error-rate", "2"], "--max-error-rate"),
        (["a.png", "out", "--prompt", "?", "--max-tiles", "0"], "max_tiles"),
        (["records.jsonl", "out", "--workers", "-1"], "--workers"),
        (["records.jsonl", "out", "--record-timeout", "0"], "--record-timeout"),
        *(
            (["records.jsonl", "out", name, value], name)
            for name, values in {
                "--record-timeout": ("nan", "inf", "-1", "1e300"),
                "--max-error-rate": ("nan", "inf", "-0.1"),
                "--workers": ("99999999",),
                "--shard-size": ("-1", "1" + "0" * 30),
                "--num-shards": ("-2", "1" + "0" * 30),
            }.items()
            for value in values
        ),
        (["records.jsonl", "out", "--top-k", "3000000000"], "top_k"),
        (["records.jsonl", "out", "--do-sample", "--temperature", "nan"], "temperature"),
        (["records.jsonl", "out", "--temperature", "1e-60"], "temperature"),
        (["records.jsonl", "out", "--repetition-penalty", "inf"], "repetition_penalty"),
        (["records.jsonl", "out", "--seed", "-1"], "seed"),
        (["records.jsonl", "out", "--min-p", "nan"], "min_p"),
        (["records.jsonl", "a.png/out"], "a.png/out"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(flags, words, lines, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    assert main(["batch", *([] if "--model" in flags else ["--model", "tiny"]), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err
    assert not Path("out").exists() or not list(Path("out").glob("part-*"))


def test_the_python_interface_has_every_switch_and_answers_as_the_command(command, lines, tmp_path):
    (commands,) = (action.choices for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    switches = {action.dest for action in commands["batch"]._actions} - {"help", "column", "base"} | {
        "columns"
    }  # --base is `model` beside an `adapter`
    names = lambda settings: {field.name for field in dataclasses.fields(settings)}
    own = names(BatchConfig) - {"sampling", "pictures"}
    assert switches == own | names(SamplingParams) | names(PictureOptions)
    config = BatchConfig(
        input=lines, output=tmp_path / "a", model="tiny", shard_size=10, sampling=SamplingParams(seed=5), workers=0, quiet=True
    )
    summary = run_batch(config)
    code, again, _ = command(lines, tmp_path / "a", "--shard-size", "10", "--seed", "5", "--max-error-rate", "0.1")
    assert code == 0 and again["new_records"] == 0 and summary["new_records"] == 100
    command(lines, tmp_path / "b", "--shard-size", "10", "--seed", "5", "--max-error-rate", "0.1")
    assert corpus.rows_of(tmp_path / "a") == corpus.rows_of(tmp_path / "b")
    with pytest.raises(InputError, match=r"prompt was None, is 'Why\?'"):
        run_batch(dataclasses.replace(config, prompt="Why?"))
    for name in ("slots", "ring_lengths"):
        with pytest.raises(InputError, match=name):
            run_batch(dataclasses.replace(config, output=tmp_path / "c", **{name: ()}))
    with pytest.raises(InputError, match="max-error-rate"):
        dataclasses.replace(config, max_error_rate=2)


def test_a_full_disk_is_said_and_nothing_is_lost(command, lines, tmp_path, monkeypatch):
    def full(self, path, rows, key):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("smolvlm_jax.batch.sinks.JsonlSink.write", full)
        code, summary, err = command(lines, tmp_path / "a", "--shard-size", "10")
    assert code == 1 and summary is None and "No space left" in err and "Traceback" not in err
    again = command(lines, tmp_path / "a", "--shard-size", "10", "--max-error-rate", "1")[1]
    assert again["records"] == 100 and again["new_records"] <= 90


def test_doctags_are_kept_for_the_checkpoints_that_write_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"added_tokens": [{"content": "<doctag>"}]}')
    assert is_docling(tmp_path) and not is_docling(TINY)


@pytest.mark.thorough
@pytest.mark.parametrize("flags, said", [((), True), (("--quiet",), False)])
def test_the_engine_does_not_say_again_what_the_job_remarks_on(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("".join(json.dumps({"id": n, "prompt": "2", "temperature": 0.5}) + "\n" for n in range(3)))
    assert main(["batch", "in.jsonl", "out", "--model", "tiny", "--max-new-tokens", "2", "--workers", "0", *flags]) == 0
    assert capsys.readouterr().err.count("temperature") == said
