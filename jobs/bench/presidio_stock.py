"""Stock presidio-analyzer as a recogniser to compare with: all its default recognisers, no language model, no network."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from training.identifiers import import_presidio


class Found(NamedTuple):
    """What Presidio found, as offsets; `kind` is Presidio's own name of the type."""

    start: int
    end: int
    kind: str


def build_stock_presidio() -> Callable[[str], list[Found]]:
    """Presidio's AnalyzerEngine with its defaults as a function of one text. Loading takes seconds.

    Only what would reach for the network is changed: domains are checked against the public-suffix list inside
    tldextract instead of one fetched at run time.
    """
    import tldextract

    presidio = import_presidio()
    known = presidio.predefined_recognizers

    class OfflineEmailRecognizer(known.EmailRecognizer):
        """The same check of the domain, against the list that tldextract carries."""

        _suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

        def validate_result(self, pattern_text: str) -> bool:
            return self._suffixes(pattern_text).fqdn != ""

    registry = presidio.RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"])
    registry.remove_recognizer("SpacyRecognizer")
    registry.remove_recognizer("EmailRecognizer")
    registry.add_recognizer(OfflineEmailRecognizer())
    no_model = presidio.nlp_engine.NoOpNlpEngine([{"lang_code": "en", "model_name": ""}])
    engine = presidio.AnalyzerEngine(registry=registry, nlp_engine=no_model)

    def recognise(text: str) -> list[Found]:
        return [Found(r.start, r.end, r.entity_type) for r in engine.analyze(text, "en")]

    return recognise
