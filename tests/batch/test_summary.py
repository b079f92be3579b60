"""The six lines with which a job ends."""

from pathlib import Path

from smolvlm_jax.batch.summary import error_kind, summary_lines


def test_errors_that_differ_in_names_and_numbers_are_of_one_kind():
    words = "no picture at {!r}; pass a path, a URL (http, s3, gs), or base64 text; it takes {:,} tokens"
    kinds = {error_kind(words.format(name, count)) for name, count in (("a.png", 7), ("/b c/it's", 1200))}
    assert kinds == {error_kind(words.format("x", 3))} and "s3, gs" in str(kinds) and "base64 text" in str(kinds)
    why = error_kind("images[0][0]: cannot decode 'a.png': no picture of a kind that is read; these are: PNG, JPEG")
    assert why == "no picture of a kind that is read (cannot decode a picture)"
    assert error_kind("the assistant's own") == "the assistant's own" and len(error_kind("word " * 9999)) <= 90


def test_names_of_standards_keep_their_digits():
    for words in ("is not valid UTF-8", "UTF-16-LE and utf-8", "a JPEG2000 in an mp4 of H.264/AVC, MPEG-4.", "ISO-8859-1"):
        assert error_kind(f"line 17: {words}: 3,000 bytes at -5.5") == f"line …: {words}: … bytes at -…"
    assert error_kind("row 3 has 2 cells, and there are 4 names") == "row … has … cells, and there are … names"
    assert error_kind("no picture at 'UTF-8.png', /a/UTF-8") == "no picture at …"


def test_the_lines_say_what_is_there_and_how_to_go_on():
    summary = {
        "records": 1200, "answers": 1188, "errors": 12, "error_kinds": {"a": 6, "b": 3, "c": 2, "d": 1}, "num_shards": 2,
        "shard_index": 1, "new_records": 1000, "seconds": 3723.0, "records_per_second": 0.2686, "prompt_tokens": 5000,
        "new_tokens": 300, "new_tokens_per_second": 1234.5, "tiles_per_second": 2.5, "complete": True, "missing_parts": 0,
    }  # fmt: skip
    assert summary_lines(summary, Path("out"), ".parquet") == [
        "records: 1,200 of shard 1 of 2, 1,188 answered, 200 of them by other runs",
        "errors:  6 × a; 3 × b; 2 × c; 1 × others",
        "time:    1 h 2 min, 0.269 records/s",
        "tokens:  5,000 of prompts, 300 of answers, 1,234 tokens/s; 2.5 tiles/s",
        "answers: out/part-*.parquet",
        "next:    rows with an error have it in `error`; mend the input and choose another OUTPUT, or use --force",
    ]
    done = {**summary, "errors": 0, "error_kinds": {}, "num_shards": 1, "new_records": 0, "gallery": "out/_gallery.html"}
    lines = summary_lines(done, Path("out"), ".jsonl")
    assert lines[1] == "errors:  none" and "nothing was left to answer" in lines[2] and lines[4].endswith("_gallery.html")
    assert lines[5] == "next:    everything is answered"
    assert summary_lines({**done, "missing_parts": 3}, Path("o"), ".jsonl")[5].endswith("which other hosts make")
    assert summary_lines({**done, "complete": False}, Path("o"), ".jsonl")[5].endswith("run the same command again to go on")
