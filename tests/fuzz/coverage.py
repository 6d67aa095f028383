"""Bytes that libFuzzer chooses by what of the readers they reach: atheris, where it is installed.

It ends the process that it works in, so it works in one of its own.
"""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import atheris, json, sys

with atheris.instrument_imports(include=["mergeflow.formats", "mergeflow.recipe"]):
    from mergeflow.errors import MergeflowError
    from mergeflow.formats.safetensors import Safetensors
    from mergeflow.recipe.modelset import ModelSet
    from mergeflow.recipe.replay import Replay
    from mergeflow.recipe.webui import matched, recorded
from tests.fuzz.guards import held, reading
from tests.fuzz.mutation import file_of

MODELS = ModelSet({id: f"/m/{id}.safetensors" for id in ("01", "02", "03")}, {}, "/m")

def once(data):
    kind, data = data[:1], data[1:]
    if kind < b"\\x60":
        act = lambda: Safetensors().parse(reading(data), len(data))
    elif kind < b"\\xa0":
        whole = file_of(data, b"")
        act = lambda: Safetensors().parse(reading(whole), len(whole))
    else:
        text = data.decode("utf-8", "replace")
        told = {"mergeflow": text, "sd_merge_recipe": text, "sd_merge_models": text}
        if kind < b"\\xd0":
            act = lambda: Replay(told, "/f.safetensors", MODELS)
        else:
            act = lambda: matched(recorded(told, "m"), MODELS, {}, {})
    held(act, len(data), memory=False)

atheris.Setup(sys.argv, once)
atheris.Fuzz()
"""


def led(runs: int, seed: int) -> int:
    """So many cases; what libFuzzer says of them is printed, and its exit code returned: 0 if all were held."""
    arguments = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-print_final_stats=1", "-verbosity=1"]
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=False).returncode
