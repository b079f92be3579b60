"""docs/convert.md, executed: its commands in order, then its Python."""

import os
import re
import subprocess
import sys
from pathlib import Path

import convert_helpers as helpers
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "convert.md"


@pytest.mark.thorough
def test_every_command_of_the_page_runs(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    assert len(commands) >= 7
    assert all(command.startswith("smolvlm-jax ") for command in commands)
    helpers.make(tmp_path / "model")
    helpers.add_processor(tmp_path / "model")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    for command in commands:
        # this test's interpreter, and not a `smolvlm-jax` from the path
        line = command.replace("smolvlm-jax", f"{sys.executable} -m smolvlm_jax", 1)
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    assert (tmp_path / "report.html").stat().st_size > 1000
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.thorough
def test_the_commands_for_adapters_run(tmp_path):
    """docs/family.md, beside a checkpoint and an adapter for it."""
    import json

    import numpy as np
    from PIL import Image
    from safetensors.numpy import save_file

    text = (PAGE.parent / "family.md").read_text(encoding="utf-8")
    helpers.make(tmp_path / "model")
    helpers.add_processor(tmp_path / "model")
    module = "base_model.model.model.text_model.layers.0.self_attn.v_proj"
    (tmp_path / "adapter").mkdir()
    factors = {"A": np.ones((2, 48), np.float32), "B": np.ones((16, 2), np.float32)}
    save_file(
        {f"{module}.lora_{name}.weight": x for name, x in factors.items()}, tmp_path / "adapter/adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.png")
    (tmp_path / "records.jsonl").write_text('{"id": "a", "prompt": "How many?"}\n')
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    commands = re.findall(r"^\$ (smolvlm-jax .*)$", text, re.MULTILINE)
    lines = [command.replace("smolvlm-jax", f"{sys.executable} -m smolvlm_jax", 1) for command in commands]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(lines) == 3 and len(blocks) == 1
    for line in lines:
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    done = subprocess.run([sys.executable, "-c", blocks[0]], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_manifest_is_described_key_by_key(tmp_path):
    import json

    from smolvlm_jax.convert.conversion import convert

    convert(helpers.make(tmp_path / "model"), tmp_path / "orbax", quantize="int8", quiet=True)  # has every key
    keys = set(json.loads((tmp_path / "orbax" / "manifest.json").read_text()))
    table = PAGE.read_text(encoding="utf-8").split("`manifest.json` holds")[1].split("##")[0]
    described = {
        key for line in table.splitlines() if line.startswith("| `") for key in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert described == keys
