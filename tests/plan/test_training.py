"""The plan of a recipe's step: it takes what a run takes, and refuses the rest with the same words."""

import jax
import pytest

from smolvlm_jax import ColIdefics3, init_params, load, save_hf
from smolvlm_jax.cli import main
from smolvlm_jax.errors import InputError, SmolVLMError
from smolvlm_jax.plan import PlanConfig
from smolvlm_jax.plan.models import describe
from smolvlm_jax.plan.training import recipe_of, training_mesh
from smolvlm_jax.train import runner
from smolvlm_jax.train.recipes import load_recipe

RECIPE = "tiny-numbers"


def said_by_plan(*words, mesh=None):
    config = PlanConfig(recipe=RECIPE, mesh=mesh, overrides=words)
    try:
        return dict(training_mesh(config, recipe_of(config), jax.devices()).shape)
    except SmolVLMError as error:
        return str(error).removesuffix(": give --mesh, or other chips with --on")


def said_by_run(monkeypatch, *words):
    """What a run says of its devices and its batch: the next thing that it does is replaced."""
    meshes = []
    make = runner.open_mesh
    monkeypatch.setattr(runner, "open_mesh", lambda config: meshes.append(make(config)) or meshes[-1])
    monkeypatch.setattr(runner, "check_cache", lambda: 1 / 0)
    try:
        runner.run(load_recipe(RECIPE, words), progress=False)
    except ZeroDivisionError:
        return dict(meshes[-1].shape)
    except SmolVLMError as error:
        return str(error)


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["mesh.devices=8", "data.batch_size=8"], True),
        (["mesh.devices=4", "data.batch_size=4", "accumulation=3"], True),
        (["mesh.devices=8", "mesh.tensor=2", "data.batch_size=4"], True),
        (["mesh.devices=8", "data.batch_size=6"], False),
        (["mesh.devices=8", "data.batch_size=6", "accumulation=4"], False),
        (["mesh.devices=8", "mesh.data=8", "mesh.fsdp=1", "data.batch_size=12"], False),
        (["mesh.devices=16", "data.batch_size=16"], False),
        (["mesh.devices=8", "mesh.data=3"], False),
    ],
)
def test_a_plan_takes_the_devices_and_the_batch_that_a_run_takes(words, taken, monkeypatch):
    run = said_by_run(monkeypatch, *words)
    assert isinstance(run, dict) == taken and said_by_plan(*words) == run


def test_a_mesh_of_the_plan_is_as_one_of_the_recipe(monkeypatch):
    """And nothing is compiled for a batch that its devices cannot share."""
    for rows in (12, 16):
        whole = f"data.batch_size={rows}"
        run = said_by_run(monkeypatch, whole, "mesh.devices=8", "mesh.data=8", "mesh.fsdp=1")
        assert isinstance(run, dict) == (rows == 16) and said_by_plan(whole, mesh="data=8") == run


def test_the_command_refuses_a_batch_that_devices_cannot_share(capsys):
    words = ["--mode", "train", "--recipe", RECIPE, "--on", "here", "mesh.devices=8", "data.batch_size=6"]
    assert main(["plan", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "data.batch_size is 6, no multiple of the 8 devices" in line and line.endswith(
        "data.batch_size=8, or mesh.devices=6"
    )


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"mesh": "data=8"}, "mesh.data=4"),
        ({"mesh": "data=8"}, "mesh={fsdp: 8}"),
        ({"on": "v5e"}, "topology=v5e:2x2"),
        ({"model": "256m"}, "model=tiny"),
        ({"dtype": "float32"}, "dtype=bfloat16"),
        ({"attention": "einsum"}, "attention=flash"),
    ],
)
def test_what_a_switch_and_a_key_both_set_is_refused(given, word):
    with pytest.raises(InputError, match=r"set the same: leave one out$") as told:
        PlanConfig(recipe=RECIPE, overrides=(word,), **given)
    assert word in str(told.value) and f"--{next(iter(given))} " in str(told.value)
    PlanConfig(recipe=RECIPE, overrides=(word,))
    PlanConfig(recipe=RECIPE, overrides=("data.batch_size=4",), **given)


@pytest.mark.parametrize("given", [{"kinds": ("decode",)}, {"layers": (2, 2)}])
def test_what_has_no_meaning_for_a_step_is_refused(given):
    with pytest.raises(InputError, match=f"^{next(iter(given))}: of the engine, while --recipe {RECIPE}"):
        PlanConfig(recipe=RECIPE, **given)


def test_a_model_that_makes_no_text_has_no_plan(tmp_path):
    """As it is refused by the engine and by a run."""
    config = load("tiny")[0].config.replace(embedding_dim=16)
    model = ColIdefics3(config)
    save_hf(tmp_path / "m", model, init_params(model), companions="tiny")
    with pytest.raises(InputError, match="a retrieval model makes vectors and no text"):
        describe(tmp_path / "m", dtype="float32")
