"""Which calibration calls were spent on which candidate, and what is left of delta for the next one.

A gate's bound holds for calls that no choice depended on. Whoever retrains after a refusal and tests again on the
same calls has chosen by them, so each further candidate that meets a call already spent gets a smaller share of delta,
and all shares together stay within it: four fifths for the first, then a tenth, a twentieth and so on, halving. Fresh
calls cost nothing: a candidate whose calibration calls are all unspent is in round 0 again. What is asked twice in the
same form (a conversion that was killed) is one test and spends once. Append-only; written before an answer is seen.

Source: a union bound over rounds (alpha spending; DeMets and Lan 1994, "Interim analysis: the alpha spending function
approach", Statistics in Medicine 13).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from cluster.store import Store, content_hash

LEDGER_FOLDER = "calibrations"
_FIRST_SHARE = 0.8


def share_of_round(number: int) -> float:
    """Share of delta for the candidate of round `number`, counted from 0; all rounds add up to 1."""
    return _FIRST_SHARE if number == 0 else (1 - _FIRST_SHARE) / 2**number


class CalibrationLedger:
    """The spending of one store. One writer at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        paths = store.list(LEDGER_FOLDER, ".json")
        self._entries: list[dict[str, Any]] = [store.read_json(path) for path in paths]

    def round_of(self, candidate: str, example_ids: Sequence[str]) -> int:
        """How many other candidates met some of these calls before; spends nothing.

        Args:
            candidate: hash of all that makes it this test and no other: adapter, rendering, engine, epsilon.
        """
        own = next((e for e in self._entries if e["candidate"] == candidate), None)
        if own is not None and set(example_ids) <= set(own["example_ids"]):
            return own["round"]
        wanted = set(example_ids)
        return sum(e["candidate"] != candidate and not wanted.isdisjoint(e["example_ids"]) for e in self._entries)

    @property
    def entries(self) -> tuple[str, ...]:
        """Names of what was spent so far, sorted; `spent_by` takes some of them."""
        return tuple(sorted(content_hash(entry)[:24] for entry in self._entries))

    def spent_by(self, entries: Collection[str]) -> frozenset[str]:
        """Ids of the calls that these entries spent."""
        found = (entry for entry in self._entries if content_hash(entry)[:24] in entries)
        return frozenset(example_id for entry in found for example_id in entry["example_ids"])

    def spend(self, candidate: str, example_ids: Sequence[str]) -> int:
        """Write down that `candidate` is tested on these calls now. Returns its round; repeating it changes nothing."""
        number = self.round_of(candidate, example_ids)
        ids = sorted(set(example_ids))
        entry = {"candidate": candidate, "round": number, "example_ids": ids}
        if entry not in self._entries:
            self._store.write_json(f"{LEDGER_FOLDER}/{content_hash(entry)[:24]}.json", entry)
            self._entries.append(entry)
        return number
