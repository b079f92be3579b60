"""What harnesses say about a model and a request."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from smolvlm_jax.errors import InputError, MissingExtraError
from smolvlm_jax.evals.settings import answerer_of, request_settings
from smolvlm_jax.generation_config import SamplingParams


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, {"max_new_tokens": 16}),
        ({"until": "\n\n", "image_aspect_ratio": "pad", "top_p": None}, {"stop": ["\n\n"]}),
        ({"until": ["", "a"], "max_gen_toks": 5}, {"stop": ["a"], "max_new_tokens": 5}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.7, "do_sample": False}, {}),
    ],
)
def test_generation_settings_are_read_under_our_names(given, read):
    settings = request_settings(given)
    assert settings == {"do_sample": False, **read}
    assert SamplingParams(**settings)


@pytest.mark.parametrize(("given", "words"), [({"num_beams": 4}, "without beams"), ({"typo": 1}, "nothing reads that")])
def test_a_setting_that_is_not_there_is_refused_by_name(given, words):
    with pytest.raises(InputError, match=words):
        request_settings(given)


def test_a_model_argument_that_is_not_there_is_refused_by_name():
    with pytest.raises(InputError, match="no model argument 'tensor_parallel_size'; there are pretrained, adapter"):
        answerer_of("tiny", SamplingParams(), {"tensor_parallel_size": 2})


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("lmms", r"pip install 'smolvlm-jax\[lmms-eval\]' && pip install --no-deps lmms_eval$"),
        ("vlmevalkit", r"pip install git\+https://github.com/open-compass/VLMEvalKit$"),
    ],
)
def test_without_the_harness_one_line_names_the_command(monkeypatch, module, command):
    for name in ("lmms_eval", "vlmeval"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"smolvlm_jax.evals.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=command) as caught:
        importlib.import_module(f"smolvlm_jax.evals.{module}")
    assert "\n" not in str(caught.value)


@pytest.mark.thorough
def test_the_command_for_vlmevalkit_says_in_one_line_what_is_missing():
    command = [sys.executable, "-m", "smolvlm_jax.evals.vlmevalkit", "VLMEvalKit", "--pretrained", "tiny"]
    if importlib.util.find_spec("vlmeval"):
        pytest.skip("vlmeval is installed")
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.endswith("pip install git+https://github.com/open-compass/VLMEvalKit\n")
