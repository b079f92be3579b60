"""The plan of a recipe's step: it takes what a run takes, and refuses the rest with the same words."""

import jax
import pytest

from smolvlm_jax import ColIdefics3, init_params, load, make_mesh, save_hf
from smolvlm_jax.cli import main
from smolvlm_jax.errors import ConfigError, InputError, SmolVLMError
from smolvlm_jax.plan import CHIPS, Cost, Plan, PlanConfig, Workload
from smolvlm_jax.plan.figures import Memory, excess
from smolvlm_jax.plan.inference import EngineOnChips
from smolvlm_jax.plan.measure import Measurer, TooLarge
from smolvlm_jax.plan.models import describe
from smolvlm_jax.plan.report import to_text
from smolvlm_jax.plan.training import measure_step, recipe_of, training_mesh
from smolvlm_jax.plan.worker import _training
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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Ran out of memory in memory space hbm. Used 31.25G of 31.25G hbm. Exceeded hbm capacity by 1.2M.",
            "it needs 33.556 GB of a chip that has 33.554 GB for programs: 1.3 MB too much",
        ),
        ("Used 40.00G of 31.25G hbm.", "it needs 42.95 GB of a chip that has 33.55 GB for programs: 9.40 GB too much"),
        ("Used 31.25G of 31.25G hbm.", "it needs more than the 33.55 GB that a chip has for programs"),
        ("RESOURCE_EXHAUSTED", "it needs more than the 33.55 GB that a chip has for programs"),
    ],
)
def test_what_does_not_fit_says_by_how_much(text, words):
    """What the compiler says may be rounded, or nothing."""
    refused = TooLarge("a step", text)
    assert excess(refused.needed, refused.usable or CHIPS["v6e"].usable) == words
    assert excess(None, None) == "it needs more than a chip has for programs"


@pytest.mark.parametrize("on_a_known_chip", [True, False])
def test_a_program_that_the_compiler_refuses_is_told(on_a_known_chip, monkeypatch):
    """Of the engine and of a step, on a chip of the table or another."""

    def refuse(self, name, *args, **kwargs):
        raise TooLarge(name, "Used 31.25G of 31.25G hbm. Exceeded hbm capacity by 1.2M.")

    monkeypatch.setattr(Measurer, "cost", refuse)
    measurer = Measurer(CHIPS["v6e"] if on_a_known_chip else None)
    mesh, words = (
        make_mesh(1, devices=jax.devices()[:1]),
        "33.556 GB of a chip that has 33.554 GB for programs: 1.3 MB too much",
    )
    recipe = load_recipe(RECIPE, ["data.batch_size=1", "data.length=64"])
    with pytest.raises(InputError, match=rf"^the step does not fit: it needs {words}; lower memory with remat"):
        measure_step(recipe, mesh, measurer)
    config = PlanConfig(model="tiny", slots=(8,), workload=Workload(tiles=1, prompt=40, new=20))
    engine = EngineOnChips(describe("tiny", dtype="float32"), mesh, measurer, config, lambda *program: None)
    with pytest.raises(InputError, match=rf"^tiny with 8 × 256 columns does not fit: it needs {words}; lower --slots"):
        engine.measure()


def test_a_row_longer_than_the_models_positions_has_no_plan():
    """As it is refused by a run."""
    recipe = load_recipe(RECIPE, ["data.length=8193"])
    with pytest.raises(ConfigError, match=r"data\.length is 8,193, and the model has [0-9,]+ positions"):
        measure_step(recipe, make_mesh(devices=jax.devices()[:1]), None)


def test_chips_that_a_recipe_leaves_out_are_named(monkeypatch):
    """`--on v5e:2x4` for a recipe of one device is a plan of one chip, and says so."""
    found = Cost(name="step"), Memory(kinds={}, largest="step", usable=None)
    monkeypatch.setattr("smolvlm_jax.plan.training.measure_step", lambda *_: found)
    for words, unused in ((("mesh.devices=1",), len(jax.devices()) - 1), (("mesh.devices=8", "data.batch_size=8"), 0)):
        config = PlanConfig(recipe=RECIPE, overrides=words)
        told = Plan(**_training(config, jax.devices(), Measurer(None), lambda *program: None), chip="c")
        assert told.shapes.get("unused_chips", 0) == unused and (f"unused_chips {unused}" in to_text(told)) == bool(unused)
