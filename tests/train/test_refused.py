"""What a run refuses before it loads or writes anything, what it may change when it goes on, and what it says of its memory."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from train_helpers import recipe, small_checkpoint, write_records

from smolvlm_jax import resolve
from smolvlm_jax.cli import main
from smolvlm_jax.errors import ConfigError, InputError, SmolVLMError
from smolvlm_jax.records.conversations import read_conversation
from smolvlm_jax.sharding import make_mesh
from smolvlm_jax.train import DataConfig, DataSource, MeshConfig, TrainConfig, runner
from smolvlm_jax.train.continued import changes
from smolvlm_jax.train.devices import check_rows
from smolvlm_jax.train.needs import peak_bytes
from smolvlm_jax.train.plain import to_dict
from smolvlm_jax.train.recipes import load_recipe
from smolvlm_jax.train.records import open_records


@pytest.mark.parametrize(
    ("rows", "mesh", "words"),
    [
        (
            6,
            MeshConfig(),
            r"is 6, no multiple of the 8 devices .*data 1 × mesh\.fsdp 8\): write data\.batch_size=8, or mesh\.devices=6$",
        ),
        (12, MeshConfig(data=8, fsdp=1), r"mesh\.data 8 × mesh\.fsdp 1\): write data\.batch_size=8 or data\.batch_size=16$"),
        (7, MeshConfig(tensor=2), r"the 4 devices .*: write data\.batch_size=4 or data\.batch_size=8, or mesh\.devices=2$"),
        (9, MeshConfig(data=2, fsdp=-1, tensor=2), r"write data\.batch_size=8 or data\.batch_size=12$"),
    ],
)
def test_a_batch_that_the_devices_cannot_share_is_refused_with_what_to_write(rows, mesh, words):
    config = TrainConfig(steps=1, mesh=mesh, data=DataConfig(batch_size=rows))
    with pytest.raises(ConfigError, match=words):
        check_rows(config, make_mesh(mesh.data, mesh.fsdp, mesh.tensor))
    check_rows(TrainConfig(steps=1, mesh=mesh, data=DataConfig(batch_size=8)), make_mesh(mesh.data, mesh.fsdp, mesh.tensor))


@pytest.mark.parametrize(
    ("record", "columns", "answer"),
    [
        ({"query": "How many?", "label": ["four", "4"], "human": 1}, "[prompt, query], [answer, label.0]", "four"),
        ({"question": "How many?", "answers": ["four", "4"]}, "[answer, answers.0]", "four"),
        ({"question": "How many?", "answers": {"text": ["four"], "start": [3]}}, "[answer, answers.text.0]", "four"),
        ({"question": "How many?", "answers": [{"id": 1, "answer": "four"}]}, "[answer, answers.0.answer]", "four"),
        ({"Query": "How many?", "Answers": "four"}, "[prompt, Query], [answer, Answers]", "four"),
        ({"instruction": "How many?", "output": "four"}, "[prompt, instruction], [answer, output]", "four"),
        ({"query": "How?", "label": "so", "my jpg": b"\xff\xd8"}, '[prompt, query], [answer, label], [image, "my jpg"]', "so"),
    ],
)
def test_columns_of_other_names_are_named_with_what_to_write(record, columns, answer, tmp_path):
    with pytest.raises(InputError) as found:
        read_conversation(record, last="assistant")
    said = str(found.value)
    assert all(name in said for name in record) and f"data.train=[{{path: …, columns: [{columns}]}}]" in said
    if any(isinstance(value, bytes) for value in record.values()):
        return
    # What it says to write is read.
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    words = re.search(r"data\.train=\[.*\]", said)[0].replace("…", str(path))
    (source,) = load_recipe("lora-256m", [words]).data.train
    assert yaml.safe_load(f"[{columns}]") == [list(pair) for pair in source.columns]
    read = read_conversation(open_records(source)[0][0], last="assistant")
    assert read.messages[-1]["content"][0]["text"] == answer


def test_columns_that_tell_nothing_and_lists_without_a_choice():
    with pytest.raises(InputError, match=r"\(it has a, b\).*columns: \[\[prompt, COLUMN\], \[answer, COLUMN\]\]"):
        read_conversation({"a": "1", "b": 2}, last="assistant")
    with pytest.raises(InputError, match=r"answer is a list of texts, not one: .*columns: \[\[answer, answer\.0\]\]"):
        read_conversation({"prompt": "a", "answer": ["b", "c"]}, last="assistant")
    with pytest.raises(InputError, match=r"query.*rename it \(--column prompt=query; of a recipe's .*\[\[prompt, query\]\]"):
        read_conversation({"prompt": "a", "answer": "b", "query": "c"}, last="assistant")


def test_a_part_that_is_not_there_is_the_fault_of_its_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "a", "label": []}\n')
    record, _, _ = open_records(DataSource(str(path), columns=(("prompt", "query"), ("answer", "label.0"))))[0]
    assert isinstance(record, InputError) and "'label' has no part 'label.0'" in str(record)


def test_what_changes_when_a_run_goes_on_is_named():
    before = TrainConfig(steps=6, learning_rate=1e-3, data=DataConfig(batch_size=4))
    plain = json.loads(json.dumps(to_dict(before)))
    kept = TrainConfig(steps=6, learning_rate=1e-3, data=DataConfig(batch_size=4), keep=5)
    assert changes(plain, before) == changes(plain, kept) == ""
    after = TrainConfig(steps=8, learning_rate=5e-4, warmup_fraction=0.1, data=DataConfig(batch_size=8))
    want = "learning_rate was 0.001, is 0.0005; steps was 6, is 8; warmup_fraction was null, is 0.1; "
    want += "data.batch_size was 4, is 8"
    assert changes(plain, after) == want
    del plain["warmup_fraction"], plain["data"]["batch_size"]  # as older versions wrote them
    assert changes(plain, after) == "learning_rate was 0.001, is 0.0005; steps was 6, is 8"


def test_peak_bytes_counts_what_is_alive_at_once():
    x = jnp.zeros((4, 1000), jnp.float32)
    of = lambda function: peak_bytes(jax.make_jaxpr(function)(x).jaxpr)
    assert of(lambda x: x) == 0
    assert of(lambda x: jnp.sin(x)) == 16_000
    assert of(lambda x: jnp.sin(jnp.sin(jnp.sin(x)))) == 32_000  # each read once
    assert of(lambda x: (y := jnp.sin(x)) + jnp.sin(jnp.sin(y))) == 48_000
    assert of(jax.jit(lambda x: jnp.sin(jnp.sin(x)))) == 32_000
    stacked = of(lambda x: jax.lax.scan(lambda c, _: (c, jnp.sin(c)), x, None, length=10)[1])
    assert 160_000 <= stacked <= 230_000


@pytest.mark.thorough
def test_what_is_refused_leaves_nothing_and_locks_nothing(tmp_path, monkeypatch, capsys):
    """And a run that goes on names what has changed; before it compiles it says what memory it needs."""
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path, 12)
    Path("other.jsonl").write_text('{"query": "How many?", "label": ["four"]}\n')
    path = str(recipe(tmp_path, small_checkpoint(tmp_path), steps=2, output="runs/deep/run", export=False))
    before = sorted(tmp_path.rglob("*"))
    refused = {
        "data.batch_size=3": (["mesh.devices=2"], "no multiple of the 2 devices"),
        "data.train=other.jsonl": ([], "columns: [[prompt, query], [answer, label.0]]"),
        "lora.targets=nothing": ([], "matches no projection"),
        "evaluation={path: nowhere.jsonl}": ([], "evaluation.path: "),
        "data.length=20": ([], "none of the 12 records makes a sample"),
    }
    for word, (more, said) in refused.items():
        assert main(["train", path, word, *more]) == 2
        err = capsys.readouterr().err
        assert said in err and sorted(tmp_path.rglob("*")) == before, err
    assert main(["train", path, "log_every=2", "checkpoint_every=1"]) == 0
    err = capsys.readouterr().err
    assert re.search(r"memory: a step needs at most about [\d.]+ [MG]B of this machine's .*: weights .*, activations ", err)
    assert err.index("memory: a step needs") < err.index("compiled in ") < err.index("step 2 of 2")
    assert " was " not in err
    kept = Path("runs/deep/run/run.json").read_text()
    assert main(["train", path, "steps=1"]) == 2 and "is at step 2" in capsys.readouterr().err
    assert Path("runs/deep/run/run.json").read_text() == kept
    assert main(["train", path, "steps=3", "learning_rate=5e-4"]) == 0
    err = capsys.readouterr().err
    assert "smolvlm-jax: learning_rate was 0.001, is 0.0005; steps was 2, is 3 from step 3 on\n" in err
    assert "model is" not in err
    kept = Path("runs/deep/run/run.json").read_text()
    assert main(["train", path, "steps=3", "learning_rate=1e-4", "export=true"]) == 0
    err = capsys.readouterr().err
    finished = "the run is finished at step 3, its last: steps=N with a larger N goes on, another output begins anew"
    assert f"{finished}; without a step to come these changes do nothing: learning_rate\n" in err and " was " not in err
    settings = json.loads(Path("runs/deep/run/run.json").read_text())
    assert settings == {**json.loads(kept), "exported_step": 3}
    again = ["steps=3", "learning_rate=5e-4", "mesh.data=1"]  # the last: where it runs, not what it does
    assert main(["train", path, *again, "export=false"]) == 0 and f"{finished}\n" in capsys.readouterr().err
    write_records(tmp_path, 4, name="held")
    assert main(["train", path, *again, "schedule=linear", "keep=7", "evaluation.path=held.jsonl"]) == 0
    err = capsys.readouterr().err
    assert "held out: " not in err and not Path("runs/deep/run/evaluation.json").exists()
    assert (
        f"{finished}; without a step to come these changes do nothing: schedule, keep, evaluation; nothing is evaluated, "
        f"docs/evaluate.md says how to evaluate {tmp_path}/runs/deep/run/model\n"
    ) in err
    path = "runs/deep/run/run.json"  # a recipe too
    assert main(["train", path, "steps=4", "learning_rate=5e-4", "export=true"]) == 0
    err = capsys.readouterr().err
    assert f"smolvlm-jax: {tmp_path}/runs/deep/run/model is that of step 3 until this run ends\n" in err
    assert "smolvlm-jax: steps was 3, is 4 from step 4 on\n" in err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.length=0", r"data\.length must be a number from 1"),
        ("data.length=-5", r"data\.length must be a number from 1"),
        ("data.length=1025", r"data\.length is 1,025, and the model has 1,024 positions.*write data\.length=1024 or less"),
        ("data.length=5", r"none of the 4 records makes a sample: 4 too long for a row \(data\.length 5, data\.tiles"),
        ("lora={rank: 0}", r"lora\.rank must be a number from 1"),
        ("lora={rank: 4, targets: nothing}", "matches no projection; names are"),
        ("attention=nothing", "attention 'nothing' is none of auto"),
        ("evaluation={path: train.jsonl, max_new_tokens: 1024}", "the model has 1024 positions: no question fits"),
        ("loggers=[tensorboard]", "the TensorBoard logger needs"),
        ("data.batch_size=7", r"data\.batch_size is 7, no multiple"),
    ],
)
def test_settings_are_checked_before_weights_are_read_and_anything_is_written(word, said, tmp_path, monkeypatch):
    """Also where the weights cannot be read at all."""
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path, 4)
    path = recipe(tmp_path, "tiny", mesh={"devices": 2})
    monkeypatch.setattr(runner, "load", lambda *_, **__: 1 / 0)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SmolVLMError, match=said):
        runner.run(load_recipe(str(path), [word]), progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ZeroDivisionError):
        runner.run(load_recipe(str(path)), progress=False)


def test_a_tokenizer_beyond_the_embeddings_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    write_records(tmp_path, 4)
    monkeypatch.setattr(runner, "load", lambda *_, **__: 1 / 0)
    shutil.copytree(resolve("tiny"), tmp_path / "model")
    path = tmp_path / "model/tokenizer.json"
    tokenizer = json.loads(path.read_text())
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"] += [{**last, "content": f"<new {n}>", "id": last["id"] + n} for n in range(1, 450)]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="tokens beyond the model's 448 embeddings, the first of them '<new "):
        runner.run(load_recipe(str(recipe(tmp_path, tmp_path / "model"))), progress=False)
    assert not (tmp_path / "run").exists()
