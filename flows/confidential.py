"""No secret of the environment gets into a log, a traceback or Prefect's database.

What an exception says is redacted where the work ends, before Prefect or Ray see it; what is logged, where its record
is made, before any handler does. `lesa.errors.redacted` knows what is secret.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from lesa.errors import LesaError, redacted
from lesa.locks import Locked

R = TypeVar("R")


def is_refusal(error: BaseException | None) -> bool:
    """Whether input (`LesaError`), another run (`Locked`) or a named file of the disk is in the way.

    Any other error is a fault of code, and its traceback is wanted.
    """
    return isinstance(error, LesaError | Locked) or (isinstance(error, OSError) and error.filename is not None)


def confidential(work: Callable[..., R], *args: Any, **kwargs: Any) -> R:
    """Calls `work`; neither what it logs nor what it raises says a secret."""
    keep_secrets()
    try:
        return work(*args, **kwargs)
    except Exception as error:
        failure = without_secrets(error)
    raise failure  # out here, or the original would come along as its context


def without_secrets(error: BaseException) -> BaseException:
    """`error` itself where neither it nor what led to it says a secret; else one that says the same without.

    That one is a `LesaError` for a refusal and a `RuntimeError` that begins with the original's type for all else; it
    has the original's traceback, and no attribute of it.
    """
    said = "".join(traceback.format_exception(error))
    if redacted(said) == said:
        return error
    text = redacted(str(error))
    clean: BaseException
    if is_refusal(error):
        clean = LesaError(text)
    elif isinstance(error, Exception):
        clean = RuntimeError(f"{type(error).__name__}: {text}")
    else:
        clean = type(error)()  # an interrupt: what it is is all that it says
    clean.__traceback__ = error.__traceback__
    if error.__cause__ is not None:
        clean.__cause__ = without_secrets(error.__cause__)
    elif error.__context__ is not None and not error.__suppress_context__:
        clean.__context__ = without_secrets(error.__context__)
    return clean


def printed(error: BaseException) -> str:
    """The traceback as Python prints it, redacted."""
    return redacted("".join(traceback.format_exception(error)))


def keep_secrets() -> None:
    """From here on this process logs and prints errors redacted. Idempotent."""
    make_record = logging.getLogRecordFactory()
    if getattr(make_record, "keeps_secrets", False):
        return

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        try:
            said = record.getMessage()
        except Exception:  # arguments that do not fit their message: logging itself says so
            return record
        if redacted(said) != said:
            record.msg, record.args = redacted(said), ()
        if record.exc_info and record.exc_info[1] is not None:
            said = "".join(traceback.format_exception(record.exc_info[1])).rstrip("\n")
            if redacted(said) != said:
                record.exc_text = redacted(said)  # a formatter takes it as it is
        return record

    make.keeps_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make)

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)
        else:
            print(printed(error), end="", file=sys.stderr)

    def show_of_thread(failed: threading.ExceptHookArgs) -> None:
        if failed.exc_value is not None and failed.exc_type is not SystemExit:
            print(f"in thread {failed.thread and failed.thread.name}: {printed(failed.exc_value)}", file=sys.stderr)

    sys.excepthook, threading.excepthook = show, show_of_thread
