"""The bookkeeping of the web UI's checkpoint merger, and nothing else of it: what it writes into the files it merges.

Written from the description of what it does, apart from the code that reads it. Weights are left out: what a file
holds is a text that names how it was made, and stands for its bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import count
from typing import Any


@dataclass
class File:
    """A checkpoint on a disk."""

    content: str
    metadata: dict[str, str] = field(default_factory=dict)
    made: Made | None = None
    """The truth, for tests to compare with."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    @property
    def legacy(self) -> str:
        return hashlib.sha256(b"64 KiB of " + self.content.encode()).hexdigest()[:8]


@dataclass
class Made:
    """How a file was made."""

    inputs: tuple[File, ...]
    method: str
    multiplier: float
    half: bool
    vae: str


@dataclass
class Checkpoint:
    """A file as one installation knows it: by a name, and by its hash once that was computed."""

    file: File
    name: str
    sha256: str | None = None

    @property
    def stem(self) -> str:
        return self.name.replace("\\", "/").rpartition("/")[2].rpartition(".")[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """Every value that looks like JSON is parsed."""
        return {key: json.loads(text) if text[:1] == "{" else text for key, text in self.file.metadata.items()}


class WebUI:
    """One installation; no file of it is like one of another."""

    def __init__(self, owner: str = "home", *, hashing: bool = True) -> None:
        self._owner = owner
        self._hashing = hashing
        self._serial = count(1)

    def add(self, name: str, file: File | None = None, *, hashed: bool = True) -> Checkpoint:
        """Put a file into the models folder; `hashed` if it has been used before it is merged."""
        file = file or File(f"{self._owner}: original {next(self._serial)}")
        return Checkpoint(file, name, file.sha256 if hashed else None)

    def rename(self, checkpoint: Checkpoint, name: str) -> Checkpoint:
        """The cache of hashes goes by name, so that a renamed file is not hashed."""
        return Checkpoint(checkpoint.file, name)

    def merge(
        self,
        a: Checkpoint,
        b: Checkpoint | None = None,
        c: Checkpoint | None = None,
        *,
        multiplier: float = 0.5,
        custom_name: str = "",
        half: bool = True,
        vae: str = "None",
        folder: str = "",
        **fields: Any,
    ) -> Checkpoint:
        """Merge by the formula that takes so many models."""
        used = [checkpoint for checkpoint in (a, b, c) if checkpoint is not None]
        method = ("No interpolation", "Weighted sum", "Add difference")[len(used) - 1]
        recipe: dict[str, Any] = {
            "type": "webui",
            "primary_model_hash": a.sha256,
            "secondary_model_hash": b.sha256 if b else None,
            "tertiary_model_hash": c.sha256 if c else None,
            "interp_method": method,
            "multiplier": multiplier,
            "save_as_half": half,
            "custom_name": custom_name,
            "config_source": 0,
            "bake_in_vae": vae,
            "discard_weights": "",
            "is_inpainting": False,
            "is_instruct_pix2pix": False,
        }
        models: dict[str | None, Any] = {}
        for checkpoint in used:
            self._compute_sha256(checkpoint)
            models[checkpoint.sha256] = {
                "name": checkpoint.name,
                "legacy_hash": checkpoint.file.legacy,
                "sd_merge_recipe": checkpoint.metadata.get("sd_merge_recipe"),
            }
            models.update(checkpoint.metadata.get("sd_merge_models", {}))
        # The order of the header is random, so that the same merge made twice is two files.
        made = Made(tuple(checkpoint.file for checkpoint in used), method, multiplier, half, vae)
        file = File(f"{self._owner}: merge {next(self._serial)}", made=made)
        file.metadata = {
            "format": "pt",
            "sd_merge_recipe": json.dumps(recipe | fields),
            "sd_merge_models": json.dumps(models),
        }
        name = custom_name or self._default_name(method, used, multiplier)
        result = Checkpoint(file, f"{folder}{name}.safetensors")
        self._compute_sha256(result)
        return result

    def _compute_sha256(self, checkpoint: Checkpoint) -> None:
        checkpoint.sha256 = checkpoint.file.sha256 if self._hashing else None

    def _default_name(self, method: str, used: list[Checkpoint], m: float) -> str:
        names = [checkpoint.stem for checkpoint in used]
        if method == "Weighted sum":
            return f"{round(1 - m, 2)}({names[0]}) + {round(m, 2)}({names[1]})"
        if method == "Add difference":
            return f"{names[0]} + {round(m, 2)}({names[1]} - {names[2]})"
        return names[0]
