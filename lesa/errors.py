"""The one base of what this project refuses, in words that name the remedy, and no secret.

A stage or a command that ends with one prints its message alone; any other exception is a fault of code, and its
traceback is shown.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote

_HIDDEN = "***"
_SHORTEST = 5  # characters; a shorter value is a word of its own elsewhere
_SECRET_NAME = re.compile(r"(?:^|_)(?:PASSWORD|PASSWD|SECRET|TOKEN|KEY|AUTH_STRING|CREDENTIALS?)$", re.IGNORECASE)
_PASSWORD = re.compile(r"(?<=://)[^/\s:@]*:([^/\s]+)@")
# user:password@ up to the last @ of the host's part, with or without a scheme before it; what follows ? and #.
_USER = re.compile(r"(?<=://)[^/\s]*@|(?<![^\s'\"(<])[^\s/@:'\"(<]+:[^\s/]*@")
_QUERY = re.compile(r"(?<=://)([^\s?#\"<>]*)([?#])[^\s\"<>]+")


class LesaError(ValueError):
    """Something that was given cannot be used; the message names every problem and what to do."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled as its class called with its message; most descendants are made of other arguments.
        return _restored, (type(self), self.args), self.__dict__


def _restored(kind: type[LesaError], args: tuple[Any, ...]) -> LesaError:
    """An error with its message, on its way from another process; its attributes follow."""
    return kind.__new__(kind, *args)


def redacted(text: str) -> str:
    """`text` as it may be shown or kept: of its addresses without users, passwords, queries and fragments; no secrets.

    Secret is what an environment variable with such a name holds (`MLFLOW_TRACKING_PASSWORD`, `HF_TOKEN`,
    `AWS_SECRET_ACCESS_KEY`, `PREFECT_API_AUTH_STRING`), and the password of an address in any variable.
    """
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return _QUERY.sub(r"\1\2***", _USER.sub("***@", text))


def _secrets() -> set[str]:
    """Every secret of the environment, in every spelling that libraries give it."""
    environment = dict(os.environ)
    found: set[str] = set()
    for name, value in environment.items():
        if _SECRET_NAME.search(name) and not (value.startswith("/") and os.path.exists(value)):  # no key's file
            found |= {value, *value.split(":", 1)[1:]}  # of user:password the password alone too
        if "://" in value:
            found |= {password for given in _PASSWORD.findall(value) for password in (given, unquote(given))}
    # A header carries both, in base64.
    found.add(":".join(environment.get(f"MLFLOW_TRACKING_{part}", "") for part in ("USERNAME", "PASSWORD")))
    return {text for secret in found if len(secret) >= _SHORTEST for text in _spellings(secret)}


def _spellings(secret: str) -> Iterator[str]:
    yield secret
    yield quote(secret, safe="")
    yield json.dumps(secret)[1:-1]
    yield repr(secret)[1:-1]
    yield b64encode(secret.encode()).decode()
