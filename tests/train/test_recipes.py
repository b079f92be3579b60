"""Recipes: they parse, their shapes work out, their steps compile for the chips they name; what words may change in them."""

import importlib.util
import json
import platform
import sys

import handwritten_numbers as numbers
import jax
import numpy as np
import photographs
import pytest
import tiny_files
from train_helpers import ROOT

from smolvlm_jax import SmolVLMConfig, resolve
from smolvlm_jax.cli import main
from smolvlm_jax.errors import ConfigError
from smolvlm_jax.parameters import abstract_params, flatten_params
from smolvlm_jax.plan import PlanConfig, plan
from smolvlm_jax.plan.training import training_model
from smolvlm_jax.sizes import published_config
from smolvlm_jax.train.checks import check_model
from smolvlm_jax.train.config import DataConfig, TrainConfig
from smolvlm_jax.train.partition import Partition
from smolvlm_jax.train.plain import from_dict, to_dict
from smolvlm_jax.train.recipes import load_recipe, recipe_names
from smolvlm_jax.train.state import create_state

PUBLISHED = ("lora-256m", "full-500m-fsdp", "2.2b-lora-v5e8", "video-256m")


def test_these_are_built_in():
    assert set(recipe_names()) == {*PUBLISHED, "tiny-numbers", "photographs"}


def test_the_recipe_of_the_bundled_checkpoint():
    """From random weights, over the records in their order, with the optimiser that made the checkpoint."""
    config = load_recipe("tiny-numbers")
    assert (config.model, config.weights, config.data.shuffle, config.steps) == ("tiny", "random", False, numbers.STEPS)
    assert (config.learning_rate, config.restarts, config.warmup, config.schedule) == (2e-3, ((6000, 8e-4),), 200, "cosine")
    assert (config.weight_decay, config.beta2, config.clip_norm, config.dtype) == (0.05, 0.98, 1.0, "float32")


def test_the_small_files_of_the_bundled_checkpoint(tmp_path):
    """The script that makes them makes what is bundled: configuration, vocabulary, processor."""
    tiny_files.write(tmp_path)
    bundled = resolve("tiny")
    names = {path.name for path in bundled.iterdir()} - {"model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names - {"config.json"}:
        assert (tmp_path / name).read_bytes() == (bundled / name).read_bytes(), name
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, bundled))
    assert {**ours, "dtype": "float32"} == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_parse_and_have_shapes(name):
    """The state of each, by eval_shape, for the published size it names; the paper's rates where everything is trained."""
    config = load_recipe(name)
    assert config.topology and config.schedule == "cosine" and config.warmup_fraction == 0.03
    assert config.weight_decay == 0 and config.clip_norm == 1 and config.dtype == "bfloat16" and config.param_dtype == "float32"
    size = config.model.rsplit("/", 1)[-1]
    model = training_model(load_recipe(name, [f"model=shape:{size}"]))
    assert model.config == published_config(size) and model.remat == config.remat
    partition = Partition.of(model, config)
    state = jax.eval_shape(lambda p: create_state(p, partition), partition.params)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    everything = count(abstract_params(model))
    if config.lora is None:
        rates = dict(config.learning_rates)
        assert (rates["connector"], rates["text"]) == (1e-4, 2e-5) and rates["vision"] in (5e-6, 0)
        assert count(state.params) == everything
    else:
        assert count(state.params) < 0.05 * everything
        assert all("lora_" in path for path in flatten_params(state.params))
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.params))
    moments = count(state.opt_state)
    trained = count(state.params) if config.peak("vision") or config.lora else None
    assert trained is None or 2 * trained <= moments <= 2 * trained + 10


compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None or platform.machine() != "x86_64" or sys.platform != "linux",
    reason="the TPU compiler is not installed (libtpu, in the test extra on x86-64 Linux)",
)


def memory_of(recipe: str, *words: str):
    """What the compiler says that a chip needs for a recipe's step; an error if it does not fit."""
    return plan(PlanConfig(recipe=recipe, overrides=words)).memory


@pytest.mark.thorough
@compiler
def test_a_step_compiles_for_chips_that_are_not_here():
    """The bundled checkpoint's step for eight v5e chips, with all that the larger recipes use."""
    more = ["topology=v5e:2x4", "mesh.fsdp=8", "dtype=bfloat16", "remat=full", "tile_chunk=5", "data.tiles_per_row=20"]
    more += ["scan_layers=true", "data.length=512"]
    found = memory_of("photographs", *more, "accumulation=2")
    assert 0 < found.kinds["temporaries"] < found.total < 2e9


@compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_compile_for_their_topology(name):
    found = memory_of(name)
    assert found.total <= 16e9, found


@compiler
@pytest.mark.slow
def test_all_of_the_2_2b_at_one_row_a_chip():
    found = memory_of("full-500m-fsdp", "model=SmolVLM2-2.2B-Instruct", "data.batch_size=8", "accumulation=1")
    assert found.total <= 16e9, found


def test_words_change_a_recipe():
    words = [
        "steps=7",
        "data.length=512",
        "lora.rank=4",
        "data.train=[{path: a.jsonl, weight: 2}, b.parquet]",
        "learning_rate=5e-6",
    ]
    config = load_recipe("lora-256m", words)
    assert (config.steps, config.data.length, config.lora.rank, config.learning_rate) == (7, 512, 4, 5e-6)
    assert [(s.path, s.weight) for s in config.data.train] == [("a.jsonl", 2.0), ("b.parquet", 1.0)]
    assert load_recipe("lora-256m", ["lora=null"]).lora is None
    assert load_recipe("lora-256m", ["dtype=bf16"]).dtype == "bfloat16"
    both = load_recipe("lora-256m", ["lora={rank: 4}", "lora.alpha=3"]).lora
    assert (both.rank, both.alpha) == (4, 3.0)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.lenght=3"], "unknown key data.lenght; did you mean length"),
        (["num_train_epochs=3"], "unknown key num_train_epochs; here: training is counted in steps: steps=N"),
        (["lora.r=3"], "unknown key lora.r; here: rank"),
        (["mesh.tp=2"], "unknown key mesh.tp; here: tensor"),
        (["qqqqq=1"], "unknown key qqqqq; smolvlm-jax train --list shows all keys"),
        (["steps=many"], "steps is 'many'; it needs a value of type int"),
        (["steps=1.5"], "steps is 1.5"),
        (["steps"], "'steps' is not KEY=VALUE"),
        (["steps.x=3"], "steps is a value"),
        (["dtype=float16"], "dtype must be float32 or bfloat16"),
        (["schedule=triangle"], "schedule is 'triangle'; the choices are cosine, linear, constant"),
        (["learning_rates={head: 1}"], "a key of learning_rates is 'head'"),
        (["data.too_long=cut"], "data.too_long is 'cut'; the choices are skip, drop_pictures"),
        (["data.train=3"], "it needs a path, or a list of sources"),
        (["remat={"], "'remat={' is not valid YAML"),
        (["output=2024-13-45"], "'output=2024-13-45' is not valid YAML"),
        (["data.image_options={max_tiles: 1, max_tiles: 2}"], "the key 'max_tiles' occurs twice"),
        (["steps=true"], "steps is True; it needs a value of type int"),
        (["learning_rate=.nan"], "learning_rate must be a number from 1e-12 to 1000, not nan"),
        (["learning_rates={text: .inf}"], "learning_rates.text must be a number from 0 to 1000, not inf"),
        (
            ["data.train=[{path: a.jsonl, weight: .nan}]"],
            "source a.jsonl: weight must be a number from 1e-09 to 1e+09, not nan",
        ),
        (["weight_decay=.nan"], "weight_decay must be a number from 0 to 1000, not nan"),
        (["beta2=1"], "beta2 must be a number from 0 to 0.999999, not 1.0"),
        (["seed=-1"], "seed must be a number from 0 to 2,147,483,647, not -1"),
        (["restarts=[[1, -1]]"], "restarts[0][1] must be a number from 1e-12 to 1000, not -1.0"),
        (["evaluation={path: a, every: -1}"], "evaluation.every must be a number from 0 to 2,147,483,647, not -1"),
        (["lora={}", "weights=random"], "lora adapts the weights of a checkpoint"),
        (["data.length=1e18"], "data.length must be a number from 1 to 1,048,576, not 1000000000000000000"),
        (["data.window_rows=1e15"], "data.window_rows must be a number from 1 to 1,024, not 1000000000000000"),
        (["learning_rates=[[text, 1], [text, 2]]"], "learning_rates names a part twice"),
        (["output="], "output is None"),
        (["output=''"], "output is '': it names nothing"),
        (["data.train=''"], "the path of a source is '': it names nothing"),
        (['output="a\\0b"'], "it names nothing"),
        (["steps=1", "steps"], "'steps' is not KEY=VALUE"),
        (["lora.alpha=3", "lora={rank: 4}"], "'lora.alpha=3' and 'lora={rank: 4}' set the same"),
        (["lora={rank: 4}", "lora.rank=5"], "set the same"),
        (["lora=null", "lora.rank=5"], "set the same"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(ConfigError) as error:
        load_recipe("lora-256m", words)
    assert message in str(error.value)


def test_the_last_word_of_one_key_counts():
    config = load_recipe("lora-256m", ["steps=40", "lora={rank: 4}", "steps=x", "keep=3", "steps=15", "lora={rank: 5}"])
    assert (config.steps, config.keep, config.lora.rank) == (15, 3, 5)


def test_a_key_that_occurs_twice_in_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps: 2\ndata: {train: a.jsonl}\nsteps: 3\n")
    with pytest.raises(ConfigError, match=r"r.yaml is not valid YAML: the key 'steps' occurs twice"):
        load_recipe(str(path))
    path.write_bytes(b"steps: 2\noutput: \xff\n")
    with pytest.raises(ConfigError, match=r"cannot read .*r.yaml"):
        load_recipe(str(path))


def test_an_answer_that_leaves_no_question_room():
    config = load_recipe("tiny-numbers", ["evaluation={path: a.jsonl, max_new_tokens: 1024}"])
    with pytest.raises(ConfigError, match="the model has 1024 positions: no question fits"):
        check_model(config, SmolVLMConfig.from_pretrained("tiny"))


def test_no_such_recipe(capsys):
    assert main(["train", "nothing"]) == 2
    assert "not one of the built-in 2.2b-lora-v5e8, full-500m-fsdp, lora-256m" in capsys.readouterr().err


def test_words_without_a_recipe(capsys):
    assert main(["train", "model=tiny", "data.train=a.jsonl"]) == 2
    err = capsys.readouterr().err
    assert "no recipe 'model=tiny', which is KEY=VALUE: first comes a recipe, a YAML file or one of the built-in 2.2b-" in err
    assert "such as in `lora-256m model=tiny`" in err


def test_a_recipe_can_be_printed(capsys):
    import yaml

    for word, warmup in (
        ("steps=3", "warmup_fraction"),
        ("warmup_steps=7", "warmup_steps"),
        ("warmup_steps=100", "warmup_steps"),
    ):
        assert main(["train", "full-500m-fsdp", word, "--print"]) == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert from_dict(printed) == load_recipe("full-500m-fsdp", [word])
        assert [key for key in printed if key.startswith("warmup")] == [warmup]  # the one that counts


def test_switches_stand_before_and_after_the_words(capsys):
    """In every order; a word that is neither is an error that names it."""
    import yaml

    orders = (
        ["--print", "lora-256m", "steps=3", "seed=4"],
        ["lora-256m", "--print", "steps=3", "seed=4"],
        ["lora-256m", "steps=3", "--print", "--quiet", "seed=4"],
        ["lora-256m", "steps=3", "seed=4", "--check", "--print"],
    )
    for words in orders:
        assert main(["train", *words]) == 0
        found = from_dict(yaml.safe_load(capsys.readouterr().out))
        assert found == load_recipe("lora-256m", ["steps=3", "seed=4", "check=" + str("--check" in words)]), words
    for words in (["lora-256m", "--qiuet", "steps=3"], ["lora-256m", "steps=3", "-x"]):
        with pytest.raises(SystemExit) as ended:
            main(["train", *words])
        assert ended.value.code == 2 and "there is no option -" in capsys.readouterr().err
    assert main(["train", "lora-256m", "--quiet", "steps"]) == 2
    assert "'steps' is not KEY=VALUE" in capsys.readouterr().err


def test_warm_up_is_a_share_of_the_steps():
    assert TrainConfig(steps=1000, warmup_fraction=0.03).warmup == 30 and TrainConfig(steps=1000).warmup == 100
    assert DataConfig().tiles_per_row is None


def test_pieces_of_photographs_overlap_no_held_out_block(tmp_path):
    """Every name equally often, and no pixel of a block on both sides."""
    pytest.importorskip("skimage", reason="the photographs come with scikit-image (test extra)")
    photographs.write(tmp_path, train=24, old=8, held_out=12)
    for name, count in (("new", 24), ("old", 8), ("held_out", 12)):
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(lines) == count
        answers = [line["messages"][-1]["content"][0]["text"] for line in lines]
        if name != "old":
            assert {answers.count(a) for a in answers} == {count // 12} and set(answers) == set(photographs.PHOTOGRAPHS)
    blocks = [(row, column) for row in range(6) for column in range(6) if photographs.is_held_out(row, column)]
    assert len(blocks) == 9 and len({row for row, _ in blocks}) == 6
    assert (ROOT / "train" / "recipes" / "photographs.yaml").is_file()
