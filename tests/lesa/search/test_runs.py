"""The runs of a search and the file that a killed search goes on from."""

from __future__ import annotations

from pathlib import Path

from lesa.search.trials import Run, Runs, Trial, read_journal

ASKED: list[Run] = [(0, (0, 3)), (0, (0, 4)), (0, (0, 3)), (20, (0, 4))]


def search(journal: Path, asked: list[Run], key: str = "key") -> tuple[Runs, list[Run], list[tuple[int, dict]]]:
    played: list[Run] = []
    told: list[tuple[int, dict]] = []
    runs = Runs(journal, key, lambda number, values: told.append((number, values)))
    for run in asked:

        def play(run: Run = run) -> Trial:
            played.append(run)
            return Trial.of([-float(run[1][1]), -float(len(runs.made))])

        assert runs.make(run, "error" if run[0] == 0 else "trained_error", play) is runs.known[run]
    return runs, played, told


def test_a_search_begun_again_takes_from_its_journal_what_it_asks_for_in_the_same_order(tmp_path: Path) -> None:
    whole, played, told = search(tmp_path / "whole.json", ASKED)
    assert played == ASKED and [run for run, _ in whole.made] == ASKED and len(whole.known) == 3
    assert whole.known[0, (0, 3)] is whole.made[2][1], "of a run made twice the last counts"
    assert [number for number, _ in told] == [1, 2, 3, 4]
    assert told[1][1] == {"error_db": -2.5, "best_error_db": -2.5}
    assert told[3][1] == {"trained_error_db": -3.5, "best_trained_error_db": -3.5}
    for done in range(len(ASKED) + 1):
        journal = tmp_path / f"{done}.json"
        search(journal, ASKED[:done])
        again, played, retold = search(journal, ASKED)
        assert again.made == whole.made and played == ASKED[done:] and retold == told
        assert read_journal(journal, "key") == whole.made


def test_a_search_that_asks_for_something_else_makes_its_own_runs_from_there(tmp_path: Path) -> None:
    journal = tmp_path / "j.json"
    search(journal, ASKED)
    other: list[Run] = [ASKED[0], (0, (0, 5)), ASKED[1]]
    again, played, _ = search(journal, other)
    assert played == other[1:] and read_journal(journal, "key") == again.made


def test_a_journal_that_is_torn_or_of_another_search_is_not_read(tmp_path: Path) -> None:
    journal = tmp_path / "j.json"
    search(journal, ASKED)
    assert read_journal(journal, "another") == []
    for text in ("{torn", "[]", '{"key": "key", "runs": [[0]]}', '{"key": "key"}'):
        journal.write_text(text)
        assert read_journal(journal, "key") == []
