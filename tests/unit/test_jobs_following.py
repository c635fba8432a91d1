"""Who looks at a store's page sees how far its conversion is, whatever becomes of it."""

from __future__ import annotations

import pathlib

import pytest

from cluster.conversions import PROGRESS_FILE, read_conversion
from cluster.errors import StoreError
from cluster.store import Store
from jobs import following
from jobs.following import followed
from training.progress import show_progress, write_progress


def test_stages_and_runs_are_told_while_they_last(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"))
    with followed(store) as conversion:
        first = read_conversion(store)
        assert first and (first.state, first.stage, first.runs) == ("running", "curate", ())
        conversion.lap("curate")
        conversion.lap("base")
        path = tmp_path / "run.progress"
        with show_progress(path, "triage", 400):
            write_progress(path, {"step": 40, "loss": 0.5, "communication_share": 0.1})
            conversion.write()
            now = read_conversion(store)
            assert now and now.stage == "finetune" and set(now.seconds) == {"curate", "base"}
            assert [(one.name, one.step, one.num_steps, one.loss) for one in now.runs] == [("triage", 40, 400, 0.5)]
        conversion.write()
        later = read_conversion(store)
        assert later and later.runs == ()
        conversion.release = "f" * 64
    last = read_conversion(store)
    assert last and (last.state, last.stage, last.release) == ("done", None, "f" * 64)


def test_a_conversion_that_fails_says_what_stopped_it_by_its_type(tmp_path: pathlib.Path) -> None:
    store = Store(str(tmp_path / "store"))
    with pytest.raises(KeyError), followed(store) as conversion:
        conversion.lap("curate")
        raise KeyError("what a client said")
    text = (tmp_path / "store" / PROGRESS_FILE).read_text()
    last = read_conversion(store)
    assert last and (last.state, last.stage, last.error) == ("failed", "discover", "KeyError") and "client" not in text


def test_it_is_written_again_and_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_EVERY_S", 0.01)
    store = Store(str(tmp_path / "store"))
    with followed(store) as conversion:
        conversion.lap("curate")
        while (now := read_conversion(store)) is None or now.stage == "curate":
            pass
    assert now.stage == "discover"


def test_a_store_that_refuses_the_file_costs_the_conversion_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "store"))

    def refuse(path: str, value: object) -> None:
        raise StoreError("no")

    monkeypatch.setattr(store, "write_json", refuse)
    with followed(store) as conversion:
        conversion.release = "f" * 64
    assert read_conversion(store) is None


@pytest.mark.parametrize("text", ["", "[]", '{"state": "odd"}'])
def test_a_file_that_is_none_of_ours_is_no_conversion(tmp_path: pathlib.Path, text: str) -> None:
    store = Store(str(tmp_path / "store"))
    store.write_bytes(PROGRESS_FILE, text.encode())
    assert read_conversion(store) is None
