"""The manifests for Kubernetes in examples/ fit the published schemas, and say what the programs that they start can read."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from smolvlm_jax.train.recipes import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
SCHEMAS = Path(__file__).parent / "data" / "kubernetes"
_QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"


def _strict(schema: Any, properties: bool = False) -> Any:
    """A schema that refuses unknown fields, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [_strict(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    if properties:
        number = {"type": ["string", "number"]}  # what the server takes for a quantity
        return {name: number if name == _QUANTITY else _strict(value) for name, value in schema.items()}
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        return {"type": ["string", "integer"]}
    found = {key: _strict(value, key in ("properties", "definitions")) for key, value in schema.items()}
    return {"additionalProperties": False, **found} if "properties" in schema else found


def _problems(manifest: dict, schema: str) -> list[str]:
    wanted = _strict(json.loads((SCHEMAS / f"{schema}.json").read_text())["schema"])
    found = jsonschema.Draft4Validator(wanted).iter_errors(manifest)
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def _read(name: str) -> dict:
    return yaml.safe_load((EXAMPLES / name).read_text())


@pytest.mark.parametrize(("name", "schema"), [("gke-batch.yaml", "job"), ("gke-train.yaml", "jobset")])
def test_a_manifest_fits_the_published_schema(name, schema):
    manifest = _read(name)
    assert _problems(manifest, schema) == []
    job = manifest if schema == "job" else manifest["spec"]["replicatedJobs"][0]["template"]
    pod = job["spec"]["template"]
    pod["spec"]["containers"][0]["args"].append(1)
    pod["spec"]["terminationGracePeriod"] = 30
    pod["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"] = [4]
    assert len(_problems(manifest, schema)) == 3  # and says so of one that does not


def test_the_processes_of_a_training_job_find_each_other():
    manifest = _read("gke-train.yaml")
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    config = load_recipe(container["args"][0], container["args"][1:])
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert config.distributed and container["command"] == ["smolvlm-jax", "train"]
    # https://jobset.sigs.k8s.io/docs/concepts: JOBSET-REPLICATEDJOB-JOB-POD.JOBSET is the first pod's name
    name = manifest["metadata"]["name"]
    host, port = env["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{group['name']}-0-0.{name}" and int(port) in [item["containerPort"] for item in container["ports"]]
    assert int(env["JAX_NUM_PROCESSES"]) == job["completions"] == job["parallelism"] and group["replicas"] == 1
    chips = container["resources"]["limits"]["google.com/tpu"] * job["completions"]
    assert chips == config.mesh.data * config.mesh.fsdp * config.mesh.tensor
    assert env["JAX_COMPILATION_CACHE_DIR"].startswith("gs://")
    for probe in ("startupProbe", "livenessProbe"):
        assert f"{config.output}/metrics.jsonl" in container[probe]["exec"]["command"][-1]
    volumes = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert all(any(path.startswith(f"{folder}/") for folder in volumes) for path in (config.output, config.model))
