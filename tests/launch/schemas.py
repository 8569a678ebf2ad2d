"""Write the schemas that tests check launch/'s manifests against, reduced to what the manifests use.

    python tests/launch/schemas.py JOBSET_CHECKOUT

JOBSET_CHECKOUT: a clone of github.com/kubernetes-sigs/jobset (Apache-2.0); the CRD is read at its HEAD.
SkyPilot's schema comes from the package skypilot (Apache-2.0), which must be installed, as must PyYAML.
"""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent
CRD = "config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml"

LEFT_OUT = {"affinity", "ephemeralContainers", "initContainers", "topologySpreadConstraints"}
LEFT_OUT |= {"volumes", "volumeClaimPolicies", "lifecycle", "livenessProbe", "readinessProbe"}
LEFT_OUT |= {"startupProbe"}


def cut(schema):
    """Return the schema without descriptions, and strict: a key that it doesn't name is an error."""
    if isinstance(schema, list):
        return [cut(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: cut(each)
        for key, each in schema.items()
        if not key.startswith("x-kubernetes") and not (key == "description" and type(each) is str)
    }
    if isinstance(kept.get("properties"), dict):
        kept["properties"] = {
            key: each for key, each in kept["properties"].items() if key not in LEFT_OUT
        }
        kept.setdefault("additionalProperties", False)
    return kept


def integers_or_strings(schema):
    """Convert Kubernetes' quantities, which the CRD marks with its own keyword, to standard types."""
    if isinstance(schema, dict):
        if schema.pop("x-kubernetes-int-or-string", False):
            schema.pop("anyOf", None)
            schema["type"] = ["integer", "string"]
        for each in schema.values():
            integers_or_strings(each)
    elif isinstance(schema, list):
        for each in schema:
            integers_or_strings(each)


def write(name, source, schema):
    """Write one schema with its source."""
    text = json.dumps({"$comment": f"{source}, Apache-2.0; cut down by schemas.py", **schema})
    (HERE / name).write_text(text + "\n")


def main(checkout):
    """Write both schemas."""
    git = ["git", "-C", checkout]
    commit, text = (
        subprocess.run([*git, *command], check=True, capture_output=True, text=True).stdout
        for command in (["rev-parse", "HEAD"], ["show", f"HEAD:{CRD}"])
    )
    (version,) = yaml.safe_load(text)["spec"]["versions"]
    jobset = version["schema"]["openAPIV3Schema"]
    integers_or_strings(jobset)
    del jobset["properties"]["status"]
    jobset["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    jobset = cut(jobset)
    jobset["properties"]["metadata"].pop("additionalProperties", None)
    source = f"github.com/kubernetes-sigs/jobset {commit.strip()} {CRD}"
    write("jobset_schema.json", source, jobset)

    from sky.utils import schemas

    task = schemas.get_task_schema()
    task["properties"]["resources"] = schemas.get_resources_schema()
    for unused in ("config", "service", "volume_mounts"):
        task["properties"].pop(unused, None)
    version = importlib.metadata.version("skypilot")
    write("skypilot_schema.json", f"skypilot {version} sky/utils/schemas.py", task)


if __name__ == "__main__":
    main(*sys.argv[1:])
