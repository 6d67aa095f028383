"""The files in `deploy/`, as far as they can be checked where there is no such cluster.

Ray parses its own commands and its own cluster configs; mergeflow's words are composed; what systemd and sbatch
understand is written down here, for what is used. The RayJob has tests of its own.
"""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from mergeflow.config import schema
from mergeflow.config.convert import to_config
from tests.deploy.files import DEPLOY, FILES, SLURM, UNIT, merges, ray_starts


def test_every_way_to_a_cluster_starts_ray() -> None:
    assert {place.partition("/")[0] for place, _ in ray_starts()} == {"by-hand", "slurm", "ray-up"}
    assert len(ray_starts()) == 8


@pytest.mark.parametrize(("place", "words"), ray_starts(), ids=lambda value: value if isinstance(value, str) else "")
def test_ray_understands_how_it_is_started(place: str, words: list[str]) -> None:
    found = start.make_context("start", list(words)).params
    assert found["head"] != bool(found["address"]), place
    assert found["disable_usage_stats"], place


def test_slurm_kubernetes_and_aws_call_mergeflow() -> None:
    assert {place.partition("/")[0] for place, _ in merges()} == {"slurm", "ray-up", "kuberay"}


@pytest.mark.parametrize(("place", "words"), merges(), ids=lambda value: value if isinstance(value, str) else "")
def test_mergeflow_understands_what_it_is_told(place: str, words: list[str]) -> None:
    schema.register()
    try:
        with initialize_config_dir(str(DEPLOY.parent / "conf"), version_base="1.3"):
            config = to_config(compose("config", words))
    finally:
        GlobalHydra.instance().clear()
    assert config.executor.kind is schema.ExecutorKind.ray, place


@pytest.mark.parametrize("name", ["on-premises", "aws"])
def test_ray_accepts_its_cluster_configs(name: str) -> None:
    validate_config(prepare_config(yaml.safe_load((DEPLOY / "ray-up" / f"{name}.yaml").read_text("utf-8"))))


@pytest.mark.parametrize("name", ["on-premises", "aws"])
def test_the_cluster_configs_give_all_nodes_one_token(name: str) -> None:
    config = yaml.safe_load((DEPLOY / "ray-up" / f"{name}.yaml").read_text("utf-8"))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for command in config["head_start_ray_commands"][1:] + config["worker_start_ray_commands"][1:]:
        assert "RAY_AUTH_MODE=token " in command


SECTIONS = {
    "Unit": {"Description", "Wants", "After"},
    "Service": {
        *("User", "Environment", "EnvironmentFile", "ExecStart", "Restart", "RestartSec", "KillMode"),
        *("TimeoutStopSec", "LimitNOFILE"),
    },
    "Install": {"WantedBy"},
}
"""What systemd.unit(5), systemd.service(5) and systemd.exec(5) know, as far as it is used."""


def test_the_unit_says_what_systemd_knows() -> None:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(UNIT.read_text("utf-8"))
    assert {name: set(parser[name]) for name in parser.sections()} == SECTIONS
    assert parser["Service"]["ExecStart"].split()[-1] == "$RAY_NODE"
    assert parser["Service"]["EnvironmentFile"] == "/etc/mergeflow/ray.env"
    if shutil.which("systemd-analyze") and Path("/opt/mergeflow").exists():
        subprocess.run(["systemd-analyze", "verify", str(UNIT)], check=True, timeout=30)


DIRECTIVES = {
    "job-name": r"\w+",
    "nodes": r"\d+",
    "ntasks-per-node": r"1",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]",
    "time": r"\d\d:\d\d:\d\d",
    "signal": r"B:TERM@\d+",
    "output": r"[\w-]+%j\.log",
}
"""Options of sbatch(1) that are used, and the values that they take."""


def test_the_directives_are_options_of_sbatch() -> None:
    lines = SLURM.read_text("utf-8").splitlines()
    directives = [line.removeprefix("#SBATCH --").split("=", 1) for line in lines if line.startswith("#SBATCH")]
    assert {name for name, _ in directives} == set(DIRECTIVES)
    for name, value in directives:
        assert re.fullmatch(DIRECTIVES[name], value), name
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(number < first_command for number, line in enumerate(lines) if line.startswith("#SBATCH"))


@pytest.mark.parametrize(
    "script", [path for path in FILES if path.read_bytes().startswith(b"#!")], ids=lambda p: p.name
)
def test_a_script_is_well_formed(script: Path) -> None:
    checker = shutil.which("shellcheck")
    words = [checker, "--shell=bash"] if checker else ["bash", "-n"]
    done = subprocess.run([*words, str(script)], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
