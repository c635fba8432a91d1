"""What a gate's fingerprint is made of, and that an adapter is loaded once however many ask for it first."""

from __future__ import annotations

import pytest

from cluster import engine
from cluster.engine import rendering_version
from cluster.errors import EngineError
from serving import specialist
from serving.specialist import SpecialistConfig, fingerprint_facts, fingerprint_of

CONFIG = SpecialistConfig()


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions = {"vllm": "1.0", "transformers": "5.0", "tokenizers": "0.1"}
    monkeypatch.setattr(specialist, "_version", versions.get)
    return versions


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"max_lora_rank": 8},
        {"max_model_tokens": 512},
    ],
)
def test_an_engine_that_runs_otherwise_has_another_fingerprint(change: dict[str, object]) -> None:
    assert fingerprint_of("base", CONFIG) != fingerprint_of("base", CONFIG.model_copy(update=change))


@pytest.mark.parametrize("package", ["vllm", "transformers", "tokenizers"])
def test_another_version_of_what_answers_has_another_fingerprint(installed: dict[str, str], package: str) -> None:
    before = fingerprint_of("base", CONFIG)
    installed[package] += ".1"
    assert fingerprint_of("base", CONFIG) != before


def test_a_fingerprint_names_the_device_as_it_is_and_how_the_engine_runs() -> None:
    facts = fingerprint_facts("base", CONFIG, "NVIDIA H100")
    assert facts["device"] == "NVIDIA H100" and facts["enforce_eager"] is True and facts["base"] == "base"
    assert fingerprint_facts("base", CONFIG, "cpu") != facts


@pytest.mark.parametrize("change", [{"max_adapters": 9}, {"max_num_seqs": 4}, {"max_replicas": 2}])
def test_what_changes_no_answer_keeps_the_fingerprint(change: dict[str, object]) -> None:
    assert fingerprint_of("base", CONFIG) == fingerprint_of("base", CONFIG.model_copy(update=change))


def test_without_an_engine_there_is_no_fingerprint(installed: dict[str, str]) -> None:
    del installed["vllm"]
    with pytest.raises(EngineError, match="no vLLM is installed here; allowed.*next"):
        fingerprint_of("base", CONFIG)


@pytest.mark.parametrize("name", ["prompts.py", "confidence.py", "answers.py", "servable.py"])
def test_any_change_of_what_renders_and_keeps_answers_changes_the_version(
    tmp_path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import pathlib
    import shutil

    before = rendering_version()
    folder = pathlib.Path(engine.__file__).parent
    for path in folder.glob("*.py"):
        shutil.copyfile(path, tmp_path / path.name)
    monkeypatch.setattr(engine, "__file__", str(tmp_path / "engine.py"))
    assert rendering_version.__wrapped__() == before
    (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
    assert rendering_version.__wrapped__() != before
