"""Graded answers -> a Gate: the lowest confidence at which a specialist may answer, with a bound that holds.

The promise: for calls drawn like the calibration calls, the share of disagreement among accepted ones is at most
epsilon, except with probability delta over the draw of the calibration split. Fixed-sequence testing: thresholds are
fixed on validation, tested on calibration from high to low, each by a one-sided Clopper-Pearson bound at level delta,
and the last one before the first failure stands. Only the first true null can break the promise, so the level needs no
division by the number of thresholds; taking the lowest threshold that passes would break it.

Each test counts only as many accepted calls as its errors need: with delta .05 and epsilon .02 one error is forgiven
among 236 calls, and still one, at a level far below delta, among 300. Of 300 accepted calls 236 are therefore counted,
drawn by their session ids alone. How many are counted depends on how many are accepted, and given that number the counted
ones are independent draws from the accepted population: their errors are binomial and each test keeps its level delta.
What passes with all accepted calls also passes with the counted ones, so nothing is lost by it; the bound is that of the
counted calls.

Holds only for independent calls (at most one per session) that no earlier gate has spent, or within the share of delta
that training/ledger.py leaves for a further candidate. Sources: Clopper and Pearson
1934; Angelopoulos et al., "Learn then Test", arXiv 2110.01052 (fixed-sequence testing); Stevens 1950, "Fiducial limits of
the parameter of a discontinuous distribution", Biometrika 37 (what an exact bound loses by its steps).
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import Field

from cluster.config import Config
from cluster.errors import InputError
from cluster.records import Gate, Record, Reference, TextGrader

_MAX_CURVE_POINTS = 100
_CHANCE_TOLERANCE = 0.05
"""Chances to pass that differ by less are alike: validation is small, and the best of many estimates flatters."""


class GateConfig(Config):
    """How much disagreement is allowed, and how sure one wants to be."""

    epsilon: float = Field(default=0.05, gt=0, lt=1)
    """Largest allowed share of disagreement among accepted answers."""
    delta: float = Field(default=0.05, gt=0, lt=1)
    """Allowed probability that any gate of one release breaks its promise."""
    start_factor: float = Field(default=1.6, ge=1)
    """The first threshold is expected to accept this many times the calls that suffice without an error. 1.6 leaves
    room for one error and for a smaller draw than expected."""
    max_grid: int = Field(default=40, ge=1)
    """Most thresholds tested; more follow the risk more finely and stop earlier by chance. 40 keeps up to .012 of all
    calls more than 20 at epsilon .05 and .1, and as much at .02 (jobs/bench/gate.py); beyond 40 nothing is gained."""


class Outcome(Record):
    """One graded answer."""

    confidence: float = Field(ge=0, le=1, allow_inf_nan=False)
    """0 where serving would escalate at any threshold: unparsable, cut or invalid answers."""
    agrees: bool
    session_id: str


class HasSession(Protocol):
    """A call that belongs to a conversation: an Outcome or an Example."""

    @property
    def session_id(self) -> str: ...


CallT = TypeVar("CallT", bound=HasSession)


class _Prefix(NamedTuple):
    """The calls whose confidence is at least `threshold`."""

    threshold: float
    num_accepted: int
    num_disagreements: int


def release_delta(delta: float, num_candidates: int) -> float:
    """Level of each gate in a release of `num_candidates` tasks, refused ones counted, so that all hold together."""
    assert num_candidates >= 1, num_candidates
    return delta / num_candidates


def minimum_calls(epsilon: float, delta: float) -> int:
    """Fewest accepted calibration calls with which a gate can open: all of them agreeing."""
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


@functools.lru_cache(maxsize=4096)
def num_counted(num_accepted: int, epsilon: float, delta: float) -> tuple[int, int]:
    """How many of the accepted calls are counted, and how many errors among these pass.

    A bound of k errors among n calls is at most epsilon exactly where the binomial(n, epsilon) puts at most delta on
    k errors or fewer. Counted are the fewest calls among which as many errors pass as among all that are accepted.

    Returns:
        (calls, errors); errors is -1, and all calls are counted, where not even none would do.
    """
    from scipy.stats import binom

    def passing(num_calls: int) -> int:
        return int(binom.ppf(delta, num_calls, epsilon)) - 1 if num_calls else -1

    num_errors = passing(num_accepted)
    if num_errors < 0:
        return num_accepted, -1
    enough = bisect.bisect_left(range(num_accepted), num_errors, key=passing)
    return enough, num_errors


def clopper_pearson_upper(num_errors: int, num_calls: int, delta: float) -> float:
    """One-sided upper bound on an error rate, exceeded with probability at most delta; 1 without calls."""
    from scipy.special import betainccinv

    if num_errors >= num_calls:
        return 1.0
    return float(betainccinv(num_errors + 1, num_calls - num_errors, delta))


def clopper_pearson_interval(num_errors: int, num_calls: int, level: float = 0.95) -> tuple[float, float]:
    """Two-sided exact interval for an error rate, (1 - level) / 2 on each side; (0, 1) without calls."""
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    lower = float(betaincinv(num_errors, num_calls - num_errors + 1, tail)) if num_errors else 0.0
    return lower, clopper_pearson_upper(num_errors, num_calls, tail)


def one_call_per_session(calls: Sequence[CallT], seed: int) -> list[CallT]:
    """Draw one call of every session at random, keeping the order of `calls`.

    A session's draw depends on nothing but seed, its id and its own calls; draw before answers are generated or graded.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, call in enumerate(calls):
        places[call.session_id].append(place)
    drawn = [random.Random(f"{seed}:{session_id}").choice(its) for session_id, its in places.items()]
    return [calls[place] for place in sorted(drawn)]


def plan_grid(
    validation: Sequence[Outcome], num_calibration: int, config: GateConfig, delta: float
) -> list[float] | str:
    """Fix the thresholds to test, before any calibration answer is looked at.

    Candidates go from the highest threshold expected to accept start_factor times the calls that suffice without an
    error (or, where none is, the lowest, if it can be expected to suffice) down to the lowest one that validation does
    not rule out. Ruled out is a threshold at which the lower end of the 95% interval of validation disagreement exceeds
    epsilon. The first one tested is the highest candidate whose chance to pass, as validation has it, is about as good
    as any: where the reference itself errs now and then, a longer prefix forgives an error that a short one does not.

    Args:
        validation: one call per session, like calibration, so that its coverage is that of calibration.
        num_calibration: calibration sessions.
        delta: the level of this gate, from `release_delta`.

    Returns:
        At most max_grid distinct confidences above 0, high to low; or why the task is refused, with calibration unspent.
    """
    prefixes = _prefixes(validation)
    if not prefixes:
        return f"none of {len(validation)} validation answers can be used; train longer or choose another base model"
    enough = minimum_calls(config.epsilon, delta)
    wanted = config.start_factor * math.log(delta) / math.log1p(-config.epsilon)
    large = [p for p in prefixes if p.num_accepted * num_calibration >= wanted * len(validation)]
    if not large and prefixes[-1].num_accepted * num_calibration >= enough * len(validation):
        large = prefixes[-1:]
    plausible = [p for p in large if _is_plausible(p, config.epsilon)]
    if plausible:
        tested = _thin(plausible, config.max_grid)
        calls_per_call = num_calibration / len(validation)
        chances = [_pass_chance(p, calls_per_call, config.epsilon, delta) for p in tested]
        first = next(k for k, chance in enumerate(chances) if chance >= max(chances) - _CHANCE_TOLERANCE)
        return [p.threshold for p in tested[first:]]
    return _refuse_early(prefixes, large, len(validation), num_calibration, wanted, config.epsilon)


def certify(
    grid: Sequence[float],
    calibration: Sequence[Outcome],
    *,
    epsilon: float,
    delta: float,
    reference: Reference,
    population: str,
    fingerprint: str,
    round: int = 0,
    text_grader: TextGrader | None = None,
) -> Gate:
    """Test the grid from high to low and open the gate at the last threshold before the first failure.

    Args:
        grid: from `plan_grid`, fixed without these calibration answers.
        calibration: answers given through the engine that will serve, one per session, spent by this call.
        delta: the level of this gate, from `release_delta` and the round's share.
        round: see `Gate.round`.

    Raises:
        InputError: two calibration calls of one session, or a grid that does not go down.
    """
    _require_fixed_sequence(grid, calibration)
    shuffled = sorted(calibration, key=_place)
    passed: float | None = None
    for threshold in grid:
        counted, num_passing = _counted_at(threshold, shuffled, epsilon, delta)
        if counted.num_disagreements > num_passing:
            break
        passed = threshold
    promise: dict[str, Any] = {"epsilon": epsilon, "delta": delta, "reference": reference, "population": population}
    promise |= {
        "fingerprint": fingerprint,
        "round": round,
        "text_grader": text_grader,
        "num_calibration": len(calibration),
    }
    if passed is None:
        reason = _refuse_first(_accepted_at(grid[0], calibration), len(calibration), epsilon, delta)
        return refused_gate(reason, **promise)
    accepted = _accepted_at(passed, calibration)
    counted, _ = _counted_at(passed, shuffled, epsilon, delta)
    return Gate(
        threshold=passed,
        num_accepted=accepted.num_accepted,
        num_disagreements=accepted.num_disagreements,
        num_counted=counted.num_accepted,
        num_counted_disagreements=counted.num_disagreements,
        upper_bound=clopper_pearson_upper(counted.num_disagreements, counted.num_accepted, delta),
        coverage=accepted.num_accepted / len(calibration),
        **promise,
    )


def refused_gate(reason: str, *, num_calibration: int, **promise: Any) -> Gate:
    """A gate that accepts nothing: the task stays on the LLM.

    Args:
        promise: what was asked: reference, population, epsilon, delta, fingerprint, and round and text_grader where there are.
    """
    return Gate(
        threshold=None,
        num_calibration=num_calibration,
        num_accepted=0,
        num_disagreements=0,
        upper_bound=None,
        coverage=0.0,
        refused=reason,
        **promise,
    )


def coverage_curve(outcomes: Sequence[Outcome]) -> list[dict[str, float]]:
    """Points for the report, from the highest threshold down, at most 100.

    Returns:
        threshold; coverage, the share of all calls at or above it; disagreement among those, with its 95% interval
        lower and upper, which assumes one call per session.
    """
    return [_point(prefix, len(outcomes)) for prefix in _thin(_prefixes(outcomes), _MAX_CURVE_POINTS)]


def _point(prefix: _Prefix, num_calls: int) -> dict[str, float]:
    threshold, num_accepted, num_disagreements = prefix
    lower, upper = clopper_pearson_interval(num_disagreements, num_accepted)
    coverage, disagreement = num_accepted / num_calls, num_disagreements / num_accepted
    return {"threshold": threshold, "coverage": coverage, "disagreement": disagreement, "lower": lower, "upper": upper}


def _prefixes(outcomes: Sequence[Outcome]) -> list[_Prefix]:
    """One prefix of the confidence ranking for each distinct confidence above 0, from the highest down."""
    ranked = sorted((o for o in outcomes if o.confidence > 0), key=lambda o: -o.confidence)
    prefixes: list[_Prefix] = []
    num_disagreements = 0
    for number, outcome in enumerate(ranked, 1):
        num_disagreements += not outcome.agrees
        if prefixes and prefixes[-1].threshold == outcome.confidence:
            prefixes.pop()
        prefixes.append(_Prefix(outcome.confidence, number, num_disagreements))
    return prefixes


def _thin(prefixes: Sequence[_Prefix], max_points: int) -> list[_Prefix]:
    """At most `max_points`, the first and (beyond one point) the last among them, even in the calls they accept."""
    if len(prefixes) <= max_points:
        return list(prefixes)
    sizes = [p.num_accepted for p in prefixes]
    places = np.searchsorted(sizes, np.linspace(sizes[0], sizes[-1], max_points))
    return [prefixes[place] for place in sorted(set(places.tolist()))]


def _accepted_at(threshold: float, outcomes: Sequence[Outcome]) -> _Prefix:
    accepted = [o for o in outcomes if o.confidence >= threshold]
    return _Prefix(threshold, len(accepted), sum(not o.agrees for o in accepted))


def _place(outcome: Outcome) -> bytes:
    """Where a call stands in the order in which calls are counted: by its session, whatever it says and whenever it came."""
    return hashlib.blake2b(outcome.session_id.encode(), digest_size=8, key=b"counted").digest()


def _counted_at(threshold: float, shuffled: Sequence[Outcome], epsilon: float, delta: float) -> tuple[_Prefix, int]:
    """The counted ones of the calls accepted at a threshold, and how many disagreements among them pass (-1: none)."""
    accepted = [o for o in shuffled if o.confidence >= threshold]
    num_calls, num_passing = num_counted(len(accepted), epsilon, delta)
    return _Prefix(threshold, num_calls, sum(not o.agrees for o in accepted[:num_calls])), num_passing


def _is_plausible(prefix: _Prefix, epsilon: float) -> bool:
    return clopper_pearson_interval(prefix.num_disagreements, prefix.num_accepted)[0] <= epsilon


def _pass_chance(prefix: _Prefix, calls_per_call: float, epsilon: float, delta: float) -> float:
    """Chance that all accepted calls together pass at this threshold; the counted ones pass a little more often.

    Beta-binomial, from a Jeffreys prior and validation's counts.
    """
    from scipy.stats import betabinom

    num_calls = round(prefix.num_accepted * calls_per_call)
    num_passing = num_counted(num_calls, epsilon, delta)[1]
    num_agreements = prefix.num_accepted - prefix.num_disagreements
    return float(betabinom.cdf(num_passing, num_calls, prefix.num_disagreements + 0.5, num_agreements + 0.5))


def _require_fixed_sequence(grid: Sequence[float], calibration: Sequence[Outcome]) -> None:
    if not grid or any(below >= above for above, below in itertools.pairwise(grid)) or grid[-1] <= 0:
        raise InputError(
            f"grid: got {list(grid)}; allowed: thresholds above 0 from high to low, as plan_grid gives them"
        )
    num_sessions = len({o.session_id for o in calibration})
    if num_sessions < len(calibration):
        raise InputError(
            f"calibration: {len(calibration)} calls of {num_sessions} sessions; allowed: one call per session, because the "
            "bound assumes independent calls; draw them with one_call_per_session"
        )


def _refuse_early(
    prefixes: Sequence[_Prefix],
    large: Sequence[_Prefix],
    num_validation: int,
    num_calibration: int,
    wanted: float,
    epsilon: float,
) -> str:
    """Tell whether more calls would help (enough of the ranking agrees, or too little is known) or a better specialist."""
    sized = [p for p in prefixes if p.num_accepted * epsilon >= 1] or prefixes[-1:]
    within = [p for p in sized if p.num_disagreements <= epsilon * p.num_accepted]
    hopeful = within or [p for p in sized if not large and _is_plausible(p, epsilon)]
    if hopeful:
        coverage = hopeful[-1].num_accepted / num_validation
        missing = math.ceil(wanted / coverage) - num_calibration
        return (
            f"too few calibration calls: needs {missing} more examples; {math.ceil(wanted)} accepted ones are needed, and "
            f"of {num_calibration} calibration sessions about {coverage:.1%} can be accepted"
        )
    best = min(large or sized, key=lambda p: p.num_disagreements / p.num_accepted)
    return (
        f"validation agreement too low: at best {1 - best.num_disagreements / best.num_accepted:.1%} of the "
        f"{best.num_accepted} most confident answers agree and {1 - epsilon:.1%} must; train on more examples or choose a "
        "larger base model"
    )


def _refuse_first(tested: _Prefix, num_calibration: int, epsilon: float, delta: float) -> str:
    """Why the first threshold failed. Below the minimum no answer matters, so calibration tells nothing about answers.

    The bound is that of all accepted calls: it is above epsilon wherever the counted ones fail.
    """
    threshold, num_accepted, num_disagreements = tested
    needed = minimum_calls(epsilon, delta)
    if num_accepted < needed:
        missing = math.ceil(needed * num_calibration / max(num_accepted, 1)) - num_calibration
        return (
            f"too few calibration calls: needs {missing} more examples; {num_accepted} of {num_calibration} reach the first "
            f"threshold {threshold:.4g} and at least {needed} must"
        )
    bound = clopper_pearson_upper(num_disagreements, num_accepted, delta)
    is_within = num_disagreements <= epsilon * num_accepted
    remedy = "certify on more fresh examples" if is_within else "retrain or choose a larger base model"
    return (
        f"disagreement {num_disagreements} of {num_accepted} at the first threshold {threshold:.4g}: bound {bound:.4f} > "
        f"epsilon {epsilon:g}; {remedy} (these calibration calls are spent)"
    )
