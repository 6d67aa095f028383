"""Bytes that libFuzzer chooses by what of the readers they reach: atheris, where it is installed.

It ends the process that it works in, so it works in one of its own.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import islice
from typing import TYPE_CHECKING

from tests.fuzz.mutation import encoded, file_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fuzz.corpus import Corpus

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
        recipe, _, models = text.partition(chr(10))
        told = {"mergeflow": text, "sd_merge_recipe": recipe, "sd_merge_models": models or recipe}
        if kind < b"\\xd0":
            act = lambda: Replay(told, "/f.safetensors", MODELS)
        else:
            act = lambda: matched(recorded(told, "m"), MODELS, {}, {})
    held(act, len(data), memory=False)

atheris.Setup(sys.argv, once)
atheris.Fuzz()
"""


KINDS = {"file": b"\x00", "header": b"\x60", "recipe": b"\xa0", "web UI": b"\xd0"}
"""The first byte of a case, which says who is given the others."""


def led(runs: int, seed: int, corpus: Corpus, place: Path) -> int:
    """So many cases, beginning with `corpus`, whose files are put into a new directory of `place`.

    What libFuzzer says of them is printed, and its exit code returned: 0 if all were held.
    """
    begins = place / "begins"
    begins.mkdir()
    head = encoded(dict(islice(corpus.table.items(), 9)))
    told = {
        "file": file_of(head, bytes(9 * 64)),
        "header": b'{"k":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}',
        "recipe": corpus.ours["mergeflow"].encode(),
        "web UI": b"%s\n%s" % tuple(corpus.webui[key].encode() for key in ("sd_merge_recipe", "sd_merge_models")),
    }
    for name, data in told.items():
        (begins / name).write_bytes(KINDS[name] + data)
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=8192", "-print_final_stats=1", "-verbosity=0"]
    arguments = [*options, f"-artifact_prefix={place}/", str(begins)]
    return subprocess.run([sys.executable, "-c", PROGRAM, *arguments], check=False).returncode
