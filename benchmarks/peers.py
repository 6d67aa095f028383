"""What people would use instead, from PyPI: sd-mecha's `n_average` and mergekit-pytorch's `linear`.

Each is installed into an environment of its own in the work directory, with the torch that mergeflow is pinned to. Its
options are tried on small models first, and the fastest ones are measured. Results must be within one ULP of ours.
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import disk
from benchmarks.figures import Figure, figure, interleaved, ratio
from benchmarks.floor import Floor, floor, ways
from benchmarks.place import emptied, machine, need
from benchmarks.program import ROOT, apart, merge, output, timed
from benchmarks.pss import Pss, Watch
from benchmarks.section import Picture, Section, bars, settings_of
from benchmarks.synthetic import sdxl_models
from benchmarks.tables import Table
from mergeflow.errors import ConfigError, ExecutorError
from mergeflow.tensors import si_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from benchmarks.options import Options
    from benchmarks.tables import Cell

VERSIONS = {"sd-mecha": "sd-mecha==1.1.8", "mergekit": "mergekit==0.1.5"}
MOST_ROUNDS = 3
"""Peers take minutes."""
TRIED_SCALE, TRIED_MODELS = 0.125, 3
"""The models that options are tried on."""
ENVIRONMENT_BYTES = 4 << 30
FURTHEST = 1.0
"""ULP of fp16."""
OURS = ("local", "ray")
EVERY_SECONDS = 0.5
"""Between two samples of memory."""

N_AVERAGE = """
import pathlib, sys, torch, sd_mecha
out, threads, buffer, *paths = sys.argv[1:]
sd_mecha.merge(
    sd_mecha.n_average(*(sd_mecha.model(pathlib.Path(path)) for path in paths)),
    output=pathlib.Path(out), merge_device="cpu", merge_dtype=torch.float32, output_device="cpu",
    output_dtype=torch.float16, threads=int(threads), total_buffer_size=int(buffer),
)
"""


@dataclass(frozen=True)
class Variant:
    """A peer with some of its options."""

    peer: str
    label: str
    threads: int
    buffer: int = 0
    """Bytes, of sd-mecha."""
    flags: tuple[str, ...] = ()
    """Of mergekit."""

    def command(self, environment: Path, paths: Sequence[Path], out: Path) -> list[str]:
        """What merges `paths` into a file below `out`, which exists and is empty."""
        if self.peer == "sd-mecha":
            settings = [str(out / "merged.safetensors"), str(self.threads), str(self.buffer)]
            return [str(environment / "bin" / "python"), "-c", N_AVERAGE, *settings, *map(str, paths)]
        config = out / "mergekit.yml"
        listed = "".join(f"  - {{model: '{path}', parameters: {{weight: 1.0}}}}\n" for path in paths)
        config.write_text(f"merge_method: linear\nmodels:\n{listed}dtype: float32\nout_dtype: float16\n", "utf-8")
        program = str(environment / "bin" / "mergekit-pytorch")
        return [program, "--quiet", "--num-threads", str(self.threads), *self.flags, str(config), str(out / "made")]

    def made(self, out: Path) -> Path:
        """The file that it leaves."""
        (found,) = out.rglob("*.safetensors")
        return found


class Took(NamedTuple):
    """One merge."""

    wall: float
    memory: Pss


def variants(cores: int) -> list[Variant]:
    """The options that might be the best."""
    counts = sorted({1, cores, 2 * cores})
    mecha = [
        Variant("sd-mecha", f"threads={threads}, buffers of {buffer} GiB", threads, buffer << 30)
        for threads in counts
        for buffer in (1, 4)
    ]
    lazy = ("--lazy-unpickle",)
    kit = [
        Variant("mergekit", f"--num-threads {threads}{said}", threads, flags=flags)
        for threads in counts[:2]
        for said, flags in (("", ()), (" --lazy-unpickle --async-write", (*lazy, "--async-write")))
    ]
    return mecha + kit


def torch_pin() -> str:
    """The torch of `constraints.txt`: `torch==2.13.0`."""
    found = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    if found is None:
        raise ConfigError(f"{ROOT / 'constraints.txt'} does not pin torch; add a line like torch==2.13.0")
    return found[0]


def install(peer: str, place: Path) -> Path:
    """An environment with the peer and nothing of ours; one that was kept is used again."""
    environment = place / "peers" / peer
    done = environment / ".installed"
    if not done.exists():
        need(place, ENVIRONMENT_BYTES, f"an environment for {peer}")
        output([sys.executable, "-m", "venv", "--clear", str(environment)], place)
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        output([*pip, torch_pin(), VERSIONS[peer]], place)
        done.touch()
    return environment


def measure(wanted: Options, place: Path) -> Section:
    """Everything on the same files, each merge with a cold cache, beside the floor of the round."""
    if not wanted.peers:
        raise ConfigError("peers are installed from PyPI, some gigabytes, only when asked for; add --peers")
    environments = {peer: install(peer, place) for peer in VERSIONS}
    best = _best(environments, place)
    out, results = place / "out", place / "results"
    paths, like = sdxl_models(place, wanted.models, wanted.scale)
    need(place, 3 * like.size, "three merged files")
    found = ways(paths[0], out, like.size)
    reference = merge(paths[0].parent, place / "reference", ["target=single", "executor=local", "overwrite=true"])
    expected = place / "reference" / str(reference.manifest["outputs"][0]["file"])
    furthest: dict[str, float] = {}

    def theirs(variant: Variant) -> Took:
        disk.drop(paths)
        took = _run(variant, environments[variant.peer], paths, emptied(results))
        if variant.peer not in furthest:
            furthest[variant.peer] = _checked(variant.peer, variant.made(results), expected, place)
        emptied(results)
        return took

    def ours(executor: str) -> Took:
        disk.drop(paths)
        arguments = ["target=single", f"executor={executor}", f"executor.memory={wanted.memory}"]
        with Watch(EVERY_SECONDS) as watch:
            ran = merge(paths[0].parent, emptied(results), arguments, environment=watch.environment)
        emptied(results)
        return Took(ran.wall, watch.peak)

    acts: dict[str, Callable[[], Took | Floor]] = {peer: partial(theirs, variant) for peer, variant in best.items()}
    acts |= {executor: partial(ours, executor) for executor in OURS}
    acts["floor"] = partial(floor, paths, out, like.size, found, cold=True)
    took = interleaved(acts, min(wanted.rounds, MOST_ROUNDS))
    floors = [one.seconds for one in took["floor"] if isinstance(one, Floor)]
    merges = {name: [one for one in every if isinstance(one, Took)] for name, every in took.items() if name != "floor"}
    rows = [
        _row(name, best.get(name), merges[name], merges["local"], floors, furthest.get(name)) for name in (*OURS, *best)
    ]
    columns = ("", "options", "whole process", "to the floor", "to executor=local", "peak memory", "of it files", "ULP")
    note = (
        f"{wanted.models} models of {si_bytes(like.size)} from a cold cache; merely read and written: "
        f"{figure(floors).median:.2f} s. ULP is how far any value is from ours. Memory is PSS over all processes."
    )
    rounds = {"rounds": min(wanted.rounds, MOST_ROUNDS)}
    walls = [figure([one.wall for one in merges[name]]) for name in merges]
    picture = Picture("peers", "One merge, whole processes", "", "seconds", (bars("seconds", walls),), tuple(merges))
    table = Table(columns, tuple(rows), note=note)
    return Section("peers", (table,), settings_of(wanted) | rounds | VERSIONS, machine(place), (picture,))


def _row(
    name: str,
    variant: Variant | None,
    took: Sequence[Took],
    ours: Sequence[Took],
    floors: Sequence[float],
    furthest: float | None,
) -> tuple[Cell, ...]:
    walls = [one.wall for one in took]
    return (
        f"mergeflow, executor={name}" if variant is None else VERSIONS[name].replace("==", " "),
        "-" if variant is None else variant.label,
        figure(walls),
        ratio(walls, floors),
        ratio(walls, [one.wall for one in ours]),
        figure([one.memory.total for one in took], "B"),
        figure([one.memory.files for one in took], "B"),
        None if furthest is None else Figure(furthest, furthest, furthest, ""),
    )


def _best(environments: dict[str, Path], place: Path) -> dict[str, Variant]:
    """For each peer the variant that merges a few small models fastest."""
    paths, _ = sdxl_models(place, TRIED_MODELS, TRIED_SCALE)
    disk.warm(paths)
    took: dict[str, dict[Variant, float]] = {peer: {} for peer in environments}
    for variant in variants(os.cpu_count() or 1):
        into = emptied(place / "results")
        environment = environments[variant.peer]
        took[variant.peer][variant] = timed(variant.command(environment, paths, into), into)
    return {peer: min(every, key=every.__getitem__) for peer, every in took.items()}


def _run(variant: Variant, environment: Path, paths: Sequence[Path], into: Path) -> Took:
    command = variant.command(environment, paths, into)
    with Watch(EVERY_SECONDS) as watch:
        began = time.perf_counter()
        output(command, into, watch.environment)
        for path in into.rglob("*.safetensors"):  # as durable as ours
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return Took(time.perf_counter() - began, watch.peak)


def _checked(peer: str, theirs: Path, ours: Path, place: Path) -> float:
    found = apart(ours, theirs, place / "compared")
    if found.furthest > FURTHEST:
        raise ExecutorError(
            f"{peer} and mergeflow are {found.furthest:g} ULP apart, more than {FURTHEST:g}; with --keep the files "
            f"stay, and job=compare tells more of {ours} and {theirs}"
        )
    return found.furthest
