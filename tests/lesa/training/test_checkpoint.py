"""Resumable state: whole or absent, its own run's or nobody's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lesa.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint


def setup(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = nn.Linear(3, 2)
    return module, torch.optim.AdamW(module.parameters(), lr=0.1)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
    module(x).square().mean().backward()
    optimizer.step()


def save(folder: Path, iteration: int, key: str = "key", seed: int = 0) -> dict[str, torch.Tensor]:
    module, optimizer = setup(seed)
    for number in range(iteration):
        step(module, optimizer, number)
    best = {name: value + 1 for name, value in module.state_dict().items()}
    save_checkpoint(folder, key, module, optimizer, TrainingState(iteration, 0.5, best))
    return {name: value.clone() for name, value in module.state_dict().items()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load(folder: Path, key: str = "key") -> tuple[TrainingState | None, nn.Module, torch.optim.Optimizer]:
    module, optimizer = setup(9)
    return load_checkpoint(folder, key, module, optimizer), module, optimizer


def test_going_on_is_never_having_stopped(tmp_path: Path) -> None:
    whole, optimizer = setup()
    for number in range(6):
        step(whole, optimizer, number)
    save(tmp_path, 3)
    state, module, optimizer = load(tmp_path)
    assert state is not None and (state.iteration, state.best_loss) == (3, 0.5)
    for number in range(3, 6):
        step(module, optimizer, number)
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_the_best_state_comes_back(tmp_path: Path) -> None:
    weights = save(tmp_path, 2)
    state, _, _ = load(tmp_path)
    assert state is not None
    assert all(torch.equal(state.best[name], value + 1) for name, value in weights.items())


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert load(tmp_path / "none")[0] is None
    assert load(tmp_path)[0] is None


def test_the_two_newest_stay(tmp_path: Path) -> None:
    for iteration in (2, 4, 6):
        save(tmp_path, iteration)
    assert names(tmp_path) == ["iteration-00000004", "iteration-00000006"]
    assert sorted(p.name for p in (tmp_path / "iteration-00000006").iterdir()) == [
        "state.json",
        "state.safetensors",
    ]


def test_another_runs_checkpoint_is_never_resumed(tmp_path: Path) -> None:
    save(tmp_path, 4, key="other")
    state, module, _ = load(tmp_path)
    assert state is None
    assert torch.equal(module.weight, setup(9)[0].weight)


def test_another_runs_checkpoints_do_not_push_ours_out(tmp_path: Path) -> None:
    """A run that was killed late leaves high numbers; with a changed setting the next one starts at zero."""
    for iteration in (300, 400):
        save(tmp_path, iteration // 100, key="other")
        (tmp_path / f"iteration-{iteration // 100:08d}").rename(tmp_path / f"iteration-{iteration:08d}")
    save(tmp_path, 2)
    state, _, _ = load(tmp_path)
    assert state is not None and state.iteration == 2
    save(tmp_path, 4)
    assert names(tmp_path) == ["iteration-00000002", "iteration-00000004"]


def truncate(path: Path) -> None:
    data = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(data[: len(data) // 2])


def flip(path: Path) -> None:
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "state.safetensors").write_bytes(data)


def other_json(text: str) -> Any:
    return lambda path: (path / "state.json").write_text(text)


DAMAGE: dict[str, Any] = {
    "truncated": truncate,
    "a flipped bit": flip,
    "no tensors": lambda path: (path / "state.safetensors").unlink(),
    "no record": lambda path: (path / "state.json").unlink(),
    "half a record": other_json('{"key": "key", '),
    "a list": other_json("[]"),
    "a number": other_json("1"),
    "an empty record": other_json("{}"),
    "not text": lambda path: (path / "state.json").write_bytes(b"\xff\xfe"),
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    DAMAGE[damage](tmp_path / "iteration-00000004")
    state, _, _ = load(tmp_path)
    assert state is not None and state.iteration == 2
    if damage != "a file":
        save(tmp_path, 4)  # the run reaches it again and replaces it
        state, _, _ = load(tmp_path)
        assert state is not None and state.iteration == 4


def test_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (tmp_path / "iteration-00000004.999999999.0.partial").mkdir()
    assert load(tmp_path)[0] is not None
    assert names(tmp_path) == ["iteration-00000002"]


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("lesa.training.checkpoint.atomic.write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 4)
    assert names(tmp_path) == ["iteration-00000002"]
    state, _, _ = load(tmp_path)
    assert state is not None and state.iteration == 2


def test_the_record_is_plain(tmp_path: Path) -> None:
    save(tmp_path, 2)
    record = json.loads((tmp_path / "iteration-00000002/state.json").read_text())
    assert set(record) == {"key", "iteration", "best_loss", "sha256"}


@pytest.mark.parametrize("module", [nn.Linear(3, 2, bias=False), nn.Linear(3, 4)])
def test_a_checkpoint_of_other_tensors_starts_anew_and_changes_nothing(tmp_path: Path, module: nn.Module) -> None:
    """Experts of another version: a module that took over half of them would be nobody's."""
    save(tmp_path, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    assert load_checkpoint(tmp_path, "key", module, optimizer) is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not optimizer.state_dict()["state"]
