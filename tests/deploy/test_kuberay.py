"""The RayJob, field by field."""

from __future__ import annotations

import re

import ray
from ray.scripts.scripts import start

from tests.deploy.files import job


class Quantity(str):
    """A number with a unit, as Kubernetes writes it."""


POD = {
    "spec": {
        "securityContext": {"fsGroup": int, "runAsUser": int, "runAsNonRoot": bool},
        "containers": [
            {
                "name": str,
                "image": str,
                "env": [{"name": str, "value": str}],
                "resources": {"requests": {"cpu": Quantity, "memory": Quantity}, "limits": {}},
                "volumeMounts": [{"name": str, "mountPath": str}],
            }
        ],
        "volumes": [
            {
                "name": str,
                "persistentVolumeClaim": {"claimName": str},
                "emptyDir": {"medium": str, "sizeLimit": Quantity},
            }
        ],
    }
}
POD["spec"]["containers"][0]["resources"]["limits"] = POD["spec"]["containers"][0]["resources"]["requests"]  # type: ignore[index]
KNOWN = {
    "entrypoint": str,
    "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    "backoffLimit": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": {
        "rayVersion": str,
        "authOptions": {"mode": ("disabled", "token")},
        "headGroupSpec": {"rayStartParams": {}, "template": POD},
        "workerGroupSpecs": [
            {
                "groupName": str,
                "replicas": int,
                "minReplicas": int,
                "maxReplicas": int,
                "rayStartParams": {},
                "template": POD,
            }
        ],
    },
}
"""The fields of RayJobSpec, RayClusterSpec, HeadGroupSpec and WorkerGroupSpec that are used, and what they hold: from
ray-operator/apis/ray/v1 of github.com/ray-project/kuberay and docs.ray.io, "Configure Ray clusters to use token
authentication"; those of a pod from the reference of the Kubernetes API, core/v1."""


def unknown(found: object, known: object, place: str = "spec") -> list[str]:
    """What is there and should not be, or is of another type."""
    if isinstance(known, dict) and isinstance(found, dict):
        told = [f"{place}.{key}" for key in found if known and key not in known]
        return told + [
            one for key in found if key in known for one in unknown(found[key], known[key], f"{place}.{key}")
        ]
    if isinstance(known, list) and isinstance(found, list):
        return [one for number, item in enumerate(found) for one in unknown(item, known[0], f"{place}[{number}]")]
    if isinstance(known, tuple):
        return [] if found in known else [f"{place}={found}"]
    if known is Quantity:
        return [] if re.fullmatch(r"\d+(m|[KMGT]i)?", str(found)) else [f"{place}={found}"]
    return [] if isinstance(known, type) and type(found) is known else [f"{place}={found!r}"]


def test_the_rayjob_has_fields_that_kuberay_knows() -> None:
    found = job()
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayJob")
    assert set(found) == {"apiVersion", "kind", "metadata", "spec"}
    assert unknown(found["spec"], KNOWN) == []
    cluster = found["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        words = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        start.make_context("start", ["--head", *words])
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        assert {mount["name"] for mount in mounts} == volumes


def test_a_misspelt_field_of_a_rayjob_is_found() -> None:
    assert unknown({"entrypoint": "mergeflow", "rayClusterSpec": {"authOption": {}}}, KNOWN) == [
        "spec.rayClusterSpec.authOption"
    ]
    assert unknown({"backoffLimit": "2"}, KNOWN) == ["spec.backoffLimit='2'"]
