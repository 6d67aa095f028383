"""What is read from the files in `deploy/`: how Ray is started there, what mergeflow is told, and the RayJob."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
SLURM = DEPLOY / "slurm" / "merge.sbatch"
UNIT = DEPLOY / "by-hand" / "ray-node.service"
ENVIRONMENT = DEPLOY / "by-hand" / "ray.env"
RAYJOB = DEPLOY / "kuberay" / "rayjob.yaml"

OPTION = re.compile(r"(?<!\S)([a-z_]+(?:\.[a-z_0-9]+)*=[^\s']*)")
CALL = re.compile(r"launch\.py|merge\.sbatch|\bmergeflow [a-z_]+[.=]")


def text(path: Path) -> str:
    """A file with lines that are continued joined together."""
    return re.sub(r" *\\\n *", " ", path.read_text("utf-8"))


def ray_starts() -> list[tuple[str, list[str]]]:
    """Every call of `ray start` in `deploy/`, with the values of its variables made up."""
    found = []
    for path in [path for path in FILES if path != UNIT]:
        whole = " ".join(text(path).split()) if path.suffix == ".yaml" else text(path)
        for match in re.finditer(r"ray start ((?:--[\w-]+(?:=\S+)? ?)+)", whole):
            known = match[1].replace("$address", "192.0.2.1").replace("$port", "6379").replace("$cpus", "8")
            found.append((str(path.relative_to(DEPLOY)), known.replace('"', "").split()))
    unit = text(UNIT).partition("ray start ")[2].partition("\n")[0]
    for line in re.findall(r"^#?RAY_NODE=(.*)$", text(ENVIRONMENT), re.MULTILINE):
        found.append((str(UNIT.relative_to(DEPLOY)), unit.replace("$RAY_NODE", line).split()))
    return found


def merges() -> list[tuple[str, list[str]]]:
    """What mergeflow is told in `deploy/`: options and their values, with those of variables made up."""
    found = []
    for path in FILES:
        whole = text(path) if path != RAYJOB else "mergeflow " + job()["spec"]["entrypoint"]
        for line in whole.replace('"', "").replace("$address:$port", "192.0.2.1:6379").splitlines():
            options = OPTION.findall(line)
            if CALL.search(line) and options:
                found.append((str(path.relative_to(DEPLOY)), options))
    return found


def job() -> dict[str, Any]:
    """The RayJob; the claim comes before it."""
    claim, found = yaml.safe_load_all(RAYJOB.read_text("utf-8"))
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert isinstance(found, dict)
    return found
