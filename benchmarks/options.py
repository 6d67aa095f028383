"""What every case is told, and the words for it on the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from typing import Any

MANY = 4
NARROWEST = 1 / 32


@dataclass(frozen=True)
class Options:
    """How large, how often, where."""

    models: int = 5
    """How many synthetic models."""
    scale: float = 1.0
    """What every layer's width is multiplied by; a model has 6.94 GB at 1, 434 MB at 0.25, 109 MB at 0.125."""
    rounds: int = 5
    dir: str | None = None
    """Where big files go: below this directory; None for a temporary one."""
    keep: bool = False
    """Whether they stay, for the next run to use."""
    memory: str = "1GiB"
    """`executor.memory` of every merge, unless a case says otherwise."""
    small: bool = False
    """Whether cases with sizes of their own take small ones, to see that they work."""
    peers: bool = False
    """Whether the peers are installed, each into an environment of its own, and measured too."""


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser that understands all of `Options`, with defaults of a case's own."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--models", type=_count, help="how many synthetic models (%(default)s)")
    made.add_argument(
        "--scale",
        type=float,
        help="what every layer's width is multiplied by (%(default)s): 1 makes models of 6.94 GB, 0.5 of 1.7 GB, 0.25 "
        "of 0.43 GB, 0.125 of 0.11 GB",
    )
    made.add_argument("--rounds", type=_count, help="how often everything is measured (%(default)s)")
    made.add_argument("--dir", help="where big files are written; a temporary directory unless given")
    made.add_argument("--keep", action="store_true", help="keep the synthetic models for the next run")
    made.add_argument("--memory", help="executor.memory of the merges (%(default)s)")
    made.add_argument("--small", action="store_true", help="small sizes in the cases that have sizes of their own")
    made.add_argument("--peers", action="store_true", help="install the peers and measure them too")
    usual = Options()
    made.set_defaults(**{field.name: getattr(usual, field.name) for field in fields(Options)} | defaults)
    return made


def options(parsed: argparse.Namespace) -> Options:
    """The options among what was parsed."""
    return Options(**{field.name: getattr(parsed, field.name) for field in fields(Options)})


def many_small(wanted: Options) -> Options:
    """Four times as many models, of a quarter of the width, in about a quarter of the bytes."""
    return replace(wanted, models=MANY * wanted.models, scale=max(wanted.scale / MANY, NARROWEST))


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number from 1 on")
    return number
