"""What must not be kept: passwords and tokens in addresses, on the command line and from the environment."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
LEAST = 8
"""Characters of a secret; what is shorter is found in ordinary text."""

_SECRET = r"(?:token|secret|passw(?:or)?d|api[-_]?key|access[-_]?key|private[-_]?key|credentials?|signature)"
_NAMES = re.compile(rf"{_SECRET}(?:_id)?$", re.IGNORECASE)
"""What variables of the environment are called that hold secrets: HF_TOKEN, AWS_SECRET_ACCESS_KEY."""
_URL = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/?#\s'\"]*@)?(?P<rest>[^\s'\"<>]*)")
_VALUE = re.compile(r"(?<==)[^&#;]+")
_NAMED = re.compile(rf"({_SECRET}\s?[=:]\s?)[^\s'\"&,;{{}}$]{{{LEAST},}}", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_KNOWN = re.compile(r"\b(hf_|gh[oprsu]_|github_pat_|glpat-|sk-|xox[abp]-)[A-Za-z0-9_-]{16,}")
"""Tokens that are told by how they begin: of Hugging Face, GitHub, GitLab, OpenAI and Slack."""


def redacted(text: str) -> str:
    """`text` without secrets: the user and the values of the query in a URL, tokens, and what the environment hides.

    >>> redacted("https://me:pass@host/a.safetensors?token=abc&v=2 and s3://bucket/key")
    'https://***@host/a.safetensors?token=***&v=*** and s3://bucket/key'
    """
    if "://" in text:
        text = _URL.sub(_of_url, text)
    text = _NAMED.sub(rf"\1{HIDDEN}", text)
    text = _BEARER.sub(rf"\1\2{HIDDEN}", text)
    text = _KNOWN.sub(rf"\1{HIDDEN}", text)
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    return text


def redacted_data(value: Any) -> Any:
    """Plain data, as JSON has it, with every text in it redacted."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted_data(key): redacted_data(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_data(one) for one in value]
    return value


def _of_url(match: re.Match[str]) -> str:
    path, mark, query = match["rest"].partition("?")
    user = f"{HIDDEN}@" if match["user"] else ""
    return f"{match['scheme']}{user}{path}{mark}{_VALUE.sub(HIDDEN, query)}"


def _of_environment() -> list[str]:
    """Values of variables that are called as secrets are; paths to files that hold them are none themselves."""
    return [
        value
        for name, value in os.environ.items()
        if len(value) >= LEAST and _NAMES.search(name) and not value.startswith(("/", "~"))
    ]
