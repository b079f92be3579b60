"""generation_config.json: what has no effect refuses nothing, what is wrong names file and key."""

import json
import logging

import pytest

from smolvlm_jax import GenerationConfig
from smolvlm_jax.errors import ConfigError


def read(directory, **values):
    (directory / "generation_config.json").write_text(json.dumps(values))
    return GenerationConfig.from_pretrained(directory)


OFF = [("temperature", 0.0), ("temperature", 0), ("top_p", 0), ("top_p", 0.0), ("top_k", -1), ("top_k", 0), ("min_p", None)]


@pytest.mark.parametrize(("name", "value"), [*OFF, ("temperature", None), ("top_k", None), ("repetition_penalty", None)])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": False}, {"do_sample": None}])
def test_values_without_effect_load_quietly(name, value, sampling, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, **sampling, **{name: value}).greedy
    assert not caplog.records


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p"])
def test_other_values_without_effect_are_announced(name, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert getattr(read(tmp_path, **{name: -3}), name) == getattr(GenerationConfig(), name)
    assert f"{name}=-3" in caplog.text and "generation_config.json" in caplog.text


def test_settings_that_do_not_exist_here_are_announced(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read(tmp_path, num_beams=4, no_repeat_ngram_size=3, num_return_sequences=1, transformers_version="5", use_cache=False)
    assert "num_beams=4" in caplog.text and "no_repeat_ngram_size=3" in caplog.text and len(caplog.records) == 1
    assert "num_return_sequences" not in caplog.text


WRONG = [
    {"do_sample": True, "temperature": 0.0},
    {"do_sample": True, "top_p": 2},
    {"do_sample": True, "top_k": -2},
    {"do_sample": "yes"},
    {"temperature": "hot"},
    {"top_k": [1]},
    {"repetition_penalty": 0},
    {"max_new_tokens": -1},
    {"eos_token_id": "x"},
    {"eos_token_id": [1, None]},
    {"eos_token_id": -2},
    {"eos_token_id": 2**40},
    {"pad_token_id": 1.5},
]


@pytest.mark.parametrize("values", WRONG)
def test_wrong_values_name_file_and_key(values, tmp_path):
    with pytest.raises(ConfigError, match=r"generation_config\.json") as raised:
        read(tmp_path, **values)
    assert list(values)[-1] in str(raised.value)


def test_no_top_k_is_written_in_two_ways(tmp_path):
    assert read(tmp_path, do_sample=True, top_k=-1).top_k == read(tmp_path, do_sample=True, top_k=0).top_k == 0
