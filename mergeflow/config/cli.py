"""The command line: `python launch.py`, or `mergeflow`, which is the same program."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import TYPE_CHECKING

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from mergeflow.config import schema, trust
from mergeflow.config.jobs import CONF, Outcome, do, say
from mergeflow.config.words import in_plain_words, quote_texts
from mergeflow.errors import HeadLost, MergeflowError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mergeflow.objective import Score

INTERRUPTED = 130
BASIC = "basic"
"""The sweeper of a run, too."""


def main() -> None:
    """Compose what is typed, do it, and exit: 0 done, 1 impossible or failed, 2 bad usage, 130 interrupted."""
    try:
        _main()
    except SystemExit as end:
        if any(isinstance(error, HeadLost) for error in Outcome.told):
            # Threads of Ray still wait for its head. Over them the interpreter ends with a segmentation fault.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise


def _main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text
    sys.argv[1:] = quote_texts(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through; what they mean is said here
    signal.signal(signal.SIGTERM, _interrupt)
    schema.register()
    trust.guard()
    try:
        trust.refuse_secrets(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_job)()
    except KeyboardInterrupt:
        there = f"the outputs of {Outcome.finished} finished job(s) are there, and no other" if Outcome.finished else ""
        _fail(f"interrupted; {there or 'no output was written'}", INTERRUPTED)
    except MergeflowError as error:
        if error not in Outcome.told:
            say(str(error))
        sys.exit(max(error.exit_code, Outcome.code))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(str(in_plain_words(error, sys.argv[1:])), 2)
    except Exception as error:
        refusal = trust.refusal_within(error)
        if Outcome.begun and refusal is None:
            raise
        _fail(str(refusal or in_plain_words(error, sys.argv[1:])), 2)
    finally:
        if Outcome.kept:
            from mergeflow.drafts import hint

            say(hint(Outcome.kept))
    sys.exit(Outcome.code)


def _job(composed: DictConfig) -> Score:
    """One job: what `main` does for a run, and `hydra/launcher=basic` for each alternative of a sweep."""
    try:
        return do(composed, HydraConfig.get())
    except MergeflowError as error:
        Outcome.failed(error)
        if HydraConfig.get().runtime.choices.get("hydra/sweeper") != BASIC:
            raise  # a sweeper that optimises must see it; the basic one would do no further batch
        return None


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _fail(text: str, code: int) -> None:
    say(text)
    sys.exit(code)
