"""The protocol between what asks specialists (validation, gateway) and what serves them (vLLM on Ray Serve LLM).

Calibration and serving go through the same `answer`, so a gate certifies exactly what is served. The engine's
fingerprint names all that could change an answer or its confidence; a gate holds for one fingerprint only.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from typing import Any, Protocol

from cluster.prompts import PromptFormat
from cluster.records import Record

_RENDERING_SOURCES = ("acceptance.py", "answers.py", "confidence.py", "faces.py", "prompts.py", "servable.py")


@functools.cache
def rendering_version() -> str:
    """Hash of the sources that turn a request into token ids and token ids into an answer that is kept or not.

    Part of every engine fingerprint, and of the names of what is trained on rendered requests.
    """
    sources = [(pathlib.Path(__file__).parent / name).read_bytes() for name in _RENDERING_SOURCES]
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


class EngineAnswer(Record):
    """One answer of a specialist, before anybody decided to keep it."""

    message: dict[str, Any] | None
    """The assistant message, or None where the text does not parse as the task's kind of answer."""
    text: str
    confidence: float
    """In [0, 1], from token log-probabilities; 0 where the answer is cut or unparsable. Of a rejected one: what it could
    have reached at most."""
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    """"stop"; "length" where the answer was cut at max_answer_tokens; "rejected" where the engine gave it up, because no
    continuation could reach `stop_below`."""


class Engine(Protocol):
    """What serves one base model and its adapters."""

    async def fingerprint(self) -> str:
        """Hash of all that could change an answer or its confidence: engine, device, dtype, base, prompt code..."""
        ...

    async def load(self, adapter: str) -> None:
        """Make the adapter (a store path) resident, so that no request pays for it. Idempotent.

        Raises:
            EngineError: the adapter cannot be loaded.
        """
        ...

    async def answer(
        self,
        adapter: str | None,
        prompt_format: PromptFormat,
        request: dict[str, Any],
        max_answer_tokens: int,
        stop_below: float = 0.0,
    ) -> EngineAnswer:
        """Answer one chat.completions request greedily with `adapter` (None: the base model alone).

        A caller that is cancelled ends the generation in the engine too.

        Args:
            stop_below: confidence below which the answer is of no use; the engine ends the generation at the first token
                after which it is certain, and says so. 0 asks for the whole answer whatever its confidence.

        Raises:
            InputError: the prompt does not fit the base model's context.
            EngineError: the engine failed.
        """
        ...
