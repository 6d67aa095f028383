from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest

from mergeflow.redaction import redacted, redacted_data
from mergeflow.report import console
from mergeflow.report.comparison_json import write_json
from mergeflow.report.manifest import write_manifest

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2hunter2"
HIDDEN = {
    "a password": (f"https://me:{SECRET}@example.org/a", "https://***@example.org/a"),
    "a token for a user": (f"git+https://{SECRET}@example.org/a", "git+https://***@example.org/a"),
    "a user with an @": (f"https://me@home:{SECRET}@example.org", "https://***@example.org"),
    "a query": (f"https://h/a?token={SECRET}&x=1#part", "https://h/a?token=***&x=***#part"),
    "a signed address": (
        f"s3://b/k?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET} is gone",
        "s3://b/k?X-Amz-Credential=***&X-Amz-Signature=*** is gone",
    ),
    "a query in quotes": (f"'https://h/a?sig={SECRET}' is", "'https://h/a?sig=***' is"),
    "a header": (f"curl -H 'Authorization: Bearer {SECRET}' x", "curl -H 'Authorization: Bearer ***' x"),
    "an argument": (f"--api-key={SECRET} --model=a", "--api-key=*** --model=a"),
    "a variable": (f"HF_TOKEN={SECRET} ./score", "HF_TOKEN=*** ./score"),
    "a token of Hugging Face": ("hf_" + "a1" * 17, "hf_***"),
    "a token of GitHub": ("ghp_" + "a1" * 18, "ghp_***"),
}
SHOWN = [
    *(
        "/data/models/_x01-name.safetensors",
        "C:\\models\\a",
        "https://example.org/a/b?",
        "a@b.c",
        "selection.te0=05,11=2",
    ),
    *(
        "model 22 counts more than once",
        "tensors' SHA-256 63e2b69f1e854117fa5025e48a9f95f9e5fe1d2b0514d30ada45c7044fd06207",
    ),
    *(
        "token_embedding.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "secret=5",
    ),
]


@pytest.mark.parametrize(("text", "left"), HIDDEN.values(), ids=HIDDEN.keys())
def test_a_secret_is_hidden_and_what_is_around_it_is_not(text: str, left: str) -> None:
    assert redacted(text) == left
    assert redacted(left) == left, "what was hidden once stays as it is"


@pytest.mark.parametrize("text", SHOWN)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert redacted(text) == text


def test_secrets_of_the_environment_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password"):
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    monkeypatch.setenv("PIN_TOKEN", "1234")
    told = redacted(f"{SECRET}-HF_TOKEN, {SECRET}-AWS_SECRET_ACCESS_KEY, {SECRET}-db_password, /home/me/key.json, 1234")
    assert told == "***, ***, ***, /home/me/key.json, 1234"


def test_data_is_redacted_through_and_through() -> None:
    address = f"https://me:{SECRET}@h/a"
    told = redacted_data({address: [address, (address, 1, None)], "n": 1.5})
    assert told == {"https://***@h/a": ["https://***@h/a", ["https://***@h/a", 1, None]], "n": 1.5}


@pytest.mark.parametrize("write", [write_manifest, write_json])
def test_what_a_run_leaves_holds_no_secret(write: object, tmp_path: Path) -> None:
    assert callable(write)
    path = write({"notes": [f"https://me:{SECRET}@h/a?token={SECRET}"]}, str(tmp_path))
    assert json.loads(path.read_text()) == {"notes": ["https://***@h/a?token=***"]}


def test_the_log_and_the_results_show_names_as_they_are_but_obey_none(capsys: pytest.CaptureFixture[str]) -> None:
    name = f"[bold]a[/bold] [link=https://h]:bomb:[/link] \x1b[2J\x07\u202e https://me:{SECRET}@h/a"
    seen = "[bold]a[/bold] [link=https://h]:bomb:[/link] \\x1b[2J\\x07\\u202e https://***@h/a"
    console.messages.cache_clear()
    try:
        console.show(name)
        console.LogHandler().emit(logging.LogRecord("mergeflow", logging.INFO, "", 0, "note: %s", (name,), None))
        out, err = capsys.readouterr()
    finally:
        console.messages.cache_clear()
    assert out == f"{seen}\n"
    assert err == f"note: {seen}\n"
