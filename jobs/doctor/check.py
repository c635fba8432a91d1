"""One finding of the doctor: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

from typing import Literal

from cluster.records import Record

Status = Literal["ok", "warning", "failed"]


class Check(Record):
    """One line of the doctor's report."""

    area: str
    """What it is about: machine, packages, ray and so on."""
    name: str
    status: Status
    """`failed` stops a verb, `warning` makes one slower, poorer or riskier than it need be."""
    found: str
    """In one line, without a secret."""
    next: str = ""
    """What to do; empty where nothing is to be done."""


class Reporter:
    """Makes the checks of one area."""

    def __init__(self, area: str) -> None:
        self._area = area

    def ok(self, name: str, found: str) -> Check:
        """Nothing to do."""
        return Check(area=self._area, name=name, status="ok", found=_line(found))

    def warning(self, name: str, found: str, next: str) -> Check:
        """Works, and could be better."""
        return Check(area=self._area, name=name, status="warning", found=_line(found), next=_line(next))

    def failed(self, name: str, found: str, next: str) -> Check:
        """Does not work."""
        return Check(area=self._area, name=name, status="failed", found=_line(found), next=_line(next))

    def told(self, name: str, error: Exception, otherwise: str) -> Check:
        """A failure by an error of ours, which names what is allowed and the next command itself; else `otherwise`."""
        found, sign, rest = str(error).partition("; ")
        for word in ("next: ", "run: "):
            rest = rest.removeprefix(word)
        return self.failed(name, found, rest if sign else otherwise)


def _line(text: str) -> str:
    """One line; what others said must not steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
