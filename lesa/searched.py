"""Steps that a search found for a peer, and the file they are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lesa import atomic
from lesa.prompts import PromptError, prompt_digests

SCHEMA = "lesa-searched-peers-1"


@dataclass(frozen=True, kw_only=True)
class Searched:
    """The best steps found for one peer at one number of evaluations."""

    method: str  # a rule of lesa.forecast.RULES or a solver of lesa.solvers.SOLVERS
    num_steps: int  # of the plain run
    evaluations: int  # of the transformer in a run
    steps: tuple[int, ...]  # full steps of a rule, grid of a solver, in steps of the plain run
    psnr: float  # dB to the plain run, mean over the tuning samples, of the pictures
    runs: int  # of the pipeline that the search made
    options: Mapping[str, Any] = field(default_factory=dict)  # settings of the rule, where they were tuned too


@dataclass(frozen=True, kw_only=True)
class SearchedPeers:
    """All that one search found, and what it may be used for."""

    workload: str
    fingerprint: str  # of the transformer it was made for
    prompt_digests: tuple[str, ...]  # of the tuning prompts: never to be judged on
    tuning_samples: int
    peers: tuple[Searched, ...]

    def refuse(self, prompts: Sequence[str], fingerprint: str) -> None:
        """`ValueError` where the file is of another transformer, or saw prompts that are to be judged."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the searched peers are those of transformer {self.fingerprint[:19]}, this one is "
                f"{fingerprint[:19]}: run python -m benchmarks.search_peers again"
            )
        seen = [prompt for prompt in prompts if prompt_digests([prompt])[0] in set(self.prompt_digests)]
        if seen:
            raise PromptError(
                f"the peers' search saw {len(seen)} of {len(prompts)} prompts, e.g. {seen[0][:60]!r}: judge on others"
            )


def save_searched(path: Path, found: SearchedPeers) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(path, {"schema": SCHEMA, **asdict(found)})


def load_searched(path: Path) -> SearchedPeers:
    """`ValueError` naming what is missing or wrong."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.pop("schema") != SCHEMA:
            raise ValueError(f"schema is not {SCHEMA}")
        peers = tuple(Searched(**{**peer, "steps": tuple(peer["steps"])}) for peer in record.pop("peers"))
        record["prompt_digests"] = tuple(record["prompt_digests"])
        return SearchedPeers(peers=peers, **record)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; python -m benchmarks.search_peers makes it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of searched peers ({error}); make it again") from None
