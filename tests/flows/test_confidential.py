"""What is said by exceptions and logs of a process, without the secrets of its environment."""

from __future__ import annotations

import io
import logging
import sys
import threading
import traceback

import pytest

from flows.confidential import confidential, keep_secrets, without_secrets
from lesa.errors import LesaError, redacted

SECRET = "canary:9f/7@a3"
ADDRESS = "http://me:canary-in-url@127.0.0.1:5"


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    before = logging.getLogRecordFactory(), sys.excepthook, threading.excepthook
    yield
    logging.setLogRecordFactory(before[0])
    sys.excepthook, threading.excepthook = before[1:]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"token {SECRET}", "token ***"),
        ("canary%3A9f%2F7%40a3 in a query", "*** in a query"),
        ("Y2FuYXJ5OjlmLzdAYTM= in a header", "*** in a header"),
        ("the password canary-in-url alone", "the password *** alone"),
        (f"{ADDRESS}/api failed", "http://***@127.0.0.1:5/api failed"),
        ("nothing to hide: true", "nothing to hide: true"),
    ],
)
def test_a_secret_is_hidden_however_it_is_spelled(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "nothing")  # its name only begins like a token's
    monkeypatch.setenv("SIGNING_KEY", "/tmp")
    assert redacted(text) == shown
    assert redacted("/tmp/a") == "/tmp/a"


class Structured(Exception):
    """Says what it knows from an attribute, as clients of HTTP do."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def __str__(self) -> str:
        return f"no answer from {self.url}"


def fail(*chain: BaseException) -> None:
    try:
        raise chain[0]
    except BaseException as error:
        if len(chain) > 1:
            raise chain[1] from error
        raise


def test_an_exception_says_the_same_without_secrets() -> None:
    with pytest.raises(RuntimeError, match=r"^Structured: no answer from http://\*\*\*@127.0.0.1:5$") as caught:
        confidential(fail, Structured(ADDRESS))
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "fail", "the place is still known"
    with pytest.raises(LesaError, match=r"^not at http://\*\*\*@127") as refused:
        confidential(fail, LesaError(f"not at {ADDRESS}"))
    assert "canary" not in "".join(traceback.format_exception(refused.value))


def test_what_led_to_an_exception_is_redacted_too() -> None:
    for leading in ("cause", "context", "note", "group"):
        error: BaseException = RuntimeError("high level")
        inner = ValueError(f"low level {SECRET}")
        if leading == "cause":
            error.__cause__ = inner
        elif leading == "context":
            error.__context__ = inner
        elif leading == "note":
            error.add_note(SECRET)
        else:
            error = ExceptionGroup("several", [inner])
        said = "".join(traceback.format_exception(without_secrets(error)))
        assert "canary" not in said and SECRET not in said, leading
        assert leading == "note" or leading == "group" or "low level ***" in said


def test_an_exception_without_a_secret_is_left_alone() -> None:
    error = KeyError("key")
    with pytest.raises(KeyError) as caught:
        confidential(fail, error)
    assert caught.value is error


def test_what_is_logged_is_redacted_before_any_handler() -> None:
    keep_secrets()
    log, text = logging.getLogger("tests.confidential"), io.StringIO()
    handler = logging.StreamHandler(text)
    log.addHandler(handler)
    try:
        log.warning("%s is at %s", "it", ADDRESS)
        try:
            raise Structured(ADDRESS)
        except Structured:
            log.exception("failed with %d%%", 5)
        log.warning("plain %s", 1)
    finally:
        log.removeHandler(handler)
    said = text.getvalue()
    assert "canary" not in said and said.count("http://***@127.0.0.1:5") == 2
    assert "Traceback" in said and "plain 1" in said and "failed with 5%" in said


def test_an_error_that_nobody_caught_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    keep_secrets()
    try:
        raise Structured(ADDRESS)
    except Structured:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    thread = threading.Thread(target=fail, args=(Structured(ADDRESS),), name="worker")
    thread.start()
    thread.join()
    said = capsys.readouterr().err
    assert "canary" not in said and said.count("Structured: no answer from http://***@127.0.0.1:5") == 2
