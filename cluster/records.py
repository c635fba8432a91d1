"""The nouns that travel between stages and processes: small, frozen, JSON-serialisable records.

Field names follow OpenAI chat.completions and OpenTelemetry gen_ai.*. Records know nothing of storage,
Ray or models.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Split = Literal["train", "validation", "calibration", "test"]
AnswerKind = Literal["tool_call", "json", "label", "text"]
Reference = Literal["llm", "gold"]
ServedBy = Literal["llm", "gold", "specialist"]
Action = Literal["llm", "accept", "escalate", "fall_back", "degrade", "audit", "shadow"]
Stage = Literal["shadow", "canary", "live"]


class Record(BaseModel):
    """Frozen and strict about unknown fields, so that a renamed field fails loudly."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Usage(Record):
    """Token counts as the provider reported them; None where it did not."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class RouteDecision(Record):
    """What the gateway did with one call, and why; shown in response headers and captured.

    `accept` keeps the specialist's answer; `escalate` hands over because confidence is low or the answer
    is invalid; `fall_back` hands over because of an error, a timeout or an LLM that was quicker; `llm` never asked a
    specialist; `degrade` keeps a specialist's answer below its threshold because no LLM answers. `audit` marks the LLM's
    answer to a call whose client already had the specialist's, `shadow` the specialist's answer to a call whose client
    already had the LLM's; no client sees either.
    """

    action: Action
    reason: str
    task_id: str | None = None
    specialist: str | None = None
    confidence: float | None = None
    release: str | None = None
    agrees: bool | None = None
    """`audit` and `shadow`: whether specialist and LLM say the same; None where the specialist's answer is not kept."""
    is_named: bool = False
    """The client asked for the specialist by its name, `understudy/TASK_ID`: the router did not send the call."""


class AgentCall(Record):
    """One captured model invocation (S1)."""

    call_id: str
    ts: float
    """Seconds since the epoch, UTC, when the request arrived."""
    client_id: str
    """Pseudonym of the caller."""
    agent: str
    session_id: str
    """Pseudonym of the conversation."""
    step: int
    request: dict[str, Any]
    """The chat.completions body as the client sent it."""
    response: dict[str, Any] | None
    """The chat.completion body; None where the call failed before an answer."""
    usage: Usage = Usage()
    latency_ms: float | None = None
    cost_usd: float | None = None
    cost_basis: Literal["reported", "estimated"] | None = None
    """Whether all of `cost_usd` rests on token counts that LLMs reported, or some on an estimate by bytes
    (serving/billing.py); None where it is not known or there is no cost."""
    served_by: ServedBy = "llm"
    route: RouteDecision | None = None
    status: int = 200
    """HTTP status shown to the client; a call counts as failed from 400 up."""
    error: str | None = None
    outcome: dict[str, Any] | None = None
    label: str | None = None
    label_kind: str | None = None
    faces_person: bool = False
    is_reference: bool = False
    """Drawn by its id alone into the fixed uniform share of calls that the LLM answers whatever the specialist says."""
    audit_of: str | None = None
    """Id of the client's call that this one asks again in the background, an accepted one of the LLM, one of the LLM's of
    a specialist in its shadow stage; such a call is no client traffic."""

    @property
    def message(self) -> dict[str, Any] | None:
        """The assistant message of the first choice, or None where there is none that is well formed."""
        message = self._choice.get("message")
        return message if isinstance(message, dict) else None

    @property
    def logprobs(self) -> Any:
        """What the provider said of each token of the first choice's text (`logprobs.content`), unchecked; None where it
        said nothing."""
        found = self._choice.get("logprobs")
        return found.get("content") if isinstance(found, dict) else None

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended, or None where the provider did not say."""
        reason = self._choice.get("finish_reason")
        return reason if isinstance(reason, str) else None

    @property
    def _choice(self) -> dict[str, Any]:
        choices = (self.response or {}).get("choices")
        is_choice = isinstance(choices, list) and choices and isinstance(choices[0], dict)
        return choices[0] if is_choice else {}


class Example(Record):
    """One curated (messages, target message) pair (S2).

    In the stored train split `request` and `target` are redacted. For the other splits `load_split` joins
    the content as it was served; it rests nowhere but in calls/.
    """

    example_id: str
    split: Split
    session_id: str
    ts: float
    request: dict[str, Any]
    """As served: the client's body. Redacted: messages, tools, response_format, what a specialist learns from."""
    target: dict[str, Any]
    """The assistant message to learn or to be compared with."""
    reference: Reference
    source_call_ids: tuple[str, ...]
    client_ids: tuple[str, ...] = ()
    """Distinct pseudonyms of the callers of the source calls."""
    faces_person: bool = False
    flags: tuple[str, ...] = ()
    """What a person should look at, such as planted instructions; heuristics that change nothing by themselves."""
    cost_usd: float | None = None
    latency_ms: float | None = None
    usage: Usage = Usage()
    """Of the LLM's answer; known of examples as served alone."""
    gold: str | None = None
    """What a person says is the right answer, as the text of one (`cluster.answers.to_text`); of examples as served alone."""
    logprobs: list[tuple[str, list[tuple[str, float]]]] | None = None
    """What was likeliest at each token of the target's text, as training/stored_logprobs.py reads it; None where the LLM
    did not tell, or where redaction changed the request or the target."""


class TaskSpec(Record):
    """A recurrent kind of call that one specialist can answer (S3)."""

    task_id: str
    """Made of the call site and the form of its answers alone; other tasks and more calls leave it as it is."""
    name: str
    """Made of the task's own words, or an LLM's; for people, never a key."""
    signature: str
    kind: AnswerKind
    reference: Reference
    num_calls: int
    share_calls: float
    share_cost: float
    num_examples: dict[str, int]
    """Examples per split."""
    num_clients: int = 0
    """Distinct clients whose calls are of this task."""
    num_sessions: int = 0
    """Distinct sessions; of merged train calls only the first's counts."""
    static_lines: tuple[str, ...] = ()
    """Lines that (nearly) every prompt of the task repeats; the compact prompt format leaves them out."""
    response_format: dict[str, Any] | None = None
    topics: tuple[int, ...] = ()
    """Cluster numbers merged into this task; empty where the whole signature is one task."""
    tool_names: tuple[str, ...] = ()
    description: str = ""
    """One line for people, where an LLM was asked for it."""

    def facts(self) -> dict[str, Any]:
        """All but the words for people, as JSON: what shapes anything that is made of the task."""
        return self.model_dump(mode="json", exclude={"name", "description"})


class TextGrader(Record):
    """How free text is compared with the reference; other kinds of answers are compared by value."""

    name: Literal["exact", "chrf", "rouge_l", "embedding", "judge"] = "exact"
    """`judge` asks an LLM, in both orders; `exact` is equality once white space is normalised, which always agrees."""
    agree_at: float = Field(default=1.0, gt=0, le=1)
    """Similarity from which texts agree; of no use to `exact` and `judge`."""
    encoder: str = "hashed"
    """Of `embedding`."""


class Gate(Record):
    """How far one specialist may be trusted, or why it is refused."""

    reference: Reference
    population: str
    """What the promise is about, e.g. "calls of this task as served"."""
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    """Level each threshold was tested at: the release's delta over its number of candidates, times the round's share."""
    threshold: float | None
    """Lowest confidence that is accepted; None where refused."""
    num_calibration: int
    num_accepted: int
    num_disagreements: int
    num_counted: int = 0
    """How many of the accepted calibration calls were counted; drawn by their sessions alone (`training.gate`)."""
    num_counted_disagreements: int = 0
    upper_bound: float | None
    """One-sided Clopper-Pearson bound on disagreement among accepted calls at `threshold`, from the counted ones."""
    coverage: float
    """Share of calibration calls at or above `threshold`."""
    fingerprint: str
    round: int = 0
    """How many other candidates had met some of these calibration calls before; delta shrinks with it."""
    refused: str | None = None
    text_grader: TextGrader | None = None
    """By which free text was compared, and is in audits; None is equality."""

    @property
    def is_open(self) -> bool:
        return self.refused is None and self.threshold is not None


class Weights(Record):
    """The weights of one task, and how an engine is asked for them."""

    base: str
    """Store path of the base model folder."""
    adapter: str
    """Store path of the adapter folder."""
    merged: str | None = None
    """Store path of a copy of the base with the adapter merged in, which is asked instead of both; None where the adapter
    is multiplexed over its base."""

    @property
    def model(self) -> str:
        """Store path of the model folder that its engine serves."""
        return self.merged or self.base

    @property
    def lora(self) -> str | None:
        """Store path of the adapter that its engine is asked with; None where it is merged."""
        return None if self.merged else self.adapter


class Specialist(Weights):
    """Base + adapter + gate + report at one content hash: `task_id@sha12`."""

    task_id: str
    sha: str
    prompt_format: dict[str, Any]
    """`cluster.prompts.PromptFormat`, as JSON."""
    gate: Gate
    report: str
    max_answer_tokens: int

    @property
    def name(self) -> str:
        return f"{self.task_id}@{self.sha[:12]}"


class Rollout(Record):
    """A specialist on its way to all of its task's calls; one without is live."""

    stage: Literal["shadow", "canary"]
    """`shadow`: the LLM answers and the specialist is compared off the path. `canary`: it answers a share of sessions."""
    canary_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the sessions that are in the canary, drawn by the session alone: larger shares hold the smaller ones."""
    audit_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the calls of a canary that the LLM is asked in the background, so that evidence comes soon."""


class Release(Record):
    """Immutable map task_id -> specialist, plus the route model. Its hash is its name."""

    specialists: dict[str, Specialist]
    refused: dict[str, str]
    """task_id -> reason, for the tasks that stay on the LLM."""
    route_model: str
    """Store path of the route model folder."""
    snapshot: str
    previous: str | None = None
    created_ts: float
    rollout: dict[str, Rollout] = {}
    """task_id -> how far it is, for the specialists that are not live."""

    def stage_of(self, task_id: str) -> Stage:
        """The stage of a task that has a specialist."""
        return self.rollout[task_id].stage if task_id in self.rollout else "live"

    def models(self) -> set[str]:
        """Store paths of the models that its specialists are asked with, each of which needs an engine."""
        return {one.model for one in self.specialists.values()}
