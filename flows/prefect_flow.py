"""Flows and tasks for Prefect to show. The work is theirs alone: Prefect neither hears its secrets nor decides its end.

    from flows.prefect_flow import flow, task
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from typing import Any

import prefect
from prefect.cache_policies import NO_CACHE

from flows.confidential import confidential
from flows.ending import watched


def flow(*, name: str) -> Callable[[Callable[..., Any]], Any]:
    """`prefect.flow` for a stage. Its parameters have built-in types: Prefect looks their names up in this module."""

    def decorate(work: Callable[..., Any]) -> Any:
        @functools.wraps(work)
        def noted(*args: Any, **kwargs: Any) -> Any:
            outcome = watched()
            outcome.began = True
            if outcome.on_sigterm is not None:  # Prefect has put its own in the place, and puts this one back
                signal.signal(signal.SIGTERM, outcome.on_sigterm)
            try:
                outcome.result = confidential(work, *args, **kwargs)
                return outcome.result
            except BaseException as error:
                outcome.error = error
                raise
            finally:
                outcome.ended.set()

        return prefect.flow(name=name)(noted)

    return decorate


def task(*, name: str) -> Callable[[Callable[..., Any]], Any]:
    """`prefect.task` for a part of a stage; never answered from a cache."""

    def decorate(work: Callable[..., Any]) -> Any:
        @functools.wraps(work)
        def kept(*args: Any, **kwargs: Any) -> Any:
            return confidential(work, *args, **kwargs)

        return prefect.task(name=name, cache_policy=NO_CACHE)(kept)

    return decorate
