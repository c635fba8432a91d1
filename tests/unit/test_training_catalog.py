"""The shipped catalog of base models, the filter's reasons, and how a base model's name becomes a place to load from."""

import json
import pathlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.errors import ConfigError
from training.catalog import (
    CATALOG_PATH,
    BaseSource,
    Catalog,
    HubModel,
    Needs,
    ScratchModel,
    filter_candidates,
    load_catalog,
    resolve_base,
)

FACTS = ("released", "parameters", "license", "context_window_tokens", "has_chat_template", "has_tool_use")
EASY = Needs(p99_prompt_tokens=0, needs_tool_use=False, allowed_licenses=None, memory_gib=1000.0, max_model_tokens=0)


def make_hub(**changes: object) -> HubModel:
    cited = {"source": "https://example.org/card", "read_on": "2026-01-31"}
    fields = {
        "kind": "hub",
        "name": "some-model",
        "hub_id": "org/some-model",
        "released": {"value": "2026-01", **cited},
        "parameters": {"value": 2**30, **cited},
        "license": {"value": "Apache-2.0", **cited},
        "context_window_tokens": {"value": 4096, **cited},
        "has_chat_template": {"value": True, **cited},
        "has_tool_use": {"value": False, **cited},
        "published_scores": [{"benchmark": "IFEval", "value": 40.5, **cited}],
    }
    return HubModel.model_validate({**fields, **changes})


def make_scratch(**changes: object) -> ScratchModel:
    fields = {"layers": 2, "hidden_size": 128, "heads": 4, "intermediate_size": 384, "vocab_size": 2048}
    return ScratchModel(**{"kind": "scratch", "name": "s", "context_window_tokens": 1024, **fields, **changes})


def reason(entry: HubModel | ScratchModel, **changes: object) -> str:
    kept, rejected = filter_candidates([entry], EASY.model_copy(update=changes))
    assert not kept and [item.name for item in rejected] == [entry.name]
    return rejected[0].reason


def write_catalog(folder: pathlib.Path, entries: list[dict]) -> str:
    path = folder / "catalog.json"
    path.write_text(json.dumps({"entries": entries}))
    return str(path)


def test_every_looked_up_fact_of_the_shipped_file_has_an_address_and_a_date_or_is_null():
    hub = [entry for entry in json.loads(CATALOG_PATH.read_text())["entries"] if entry["kind"] == "hub"]
    facts = [entry[name] for entry in hub for name in FACTS] + [s for entry in hub for s in entry["published_scores"]]
    for fact in facts:
        assert fact is None or (fact["source"].startswith("https://") and len(fact["read_on"]) == len("2026-11-23"))
    assert sum(fact is not None for fact in facts) > 0.85 * len(facts)


def test_shipped_file_has_at_least_ten_hub_models_from_a_tenth_of_a_billion_to_eight_billion_parameters():
    hub = [entry for entry in load_catalog().entries if isinstance(entry, HubModel) and entry.parameters]
    assert sum(0.1e9 <= entry.parameters.value <= 8e9 for entry in hub) >= 10


def test_shipped_file_has_at_least_twenty_models_of_2025_and_2026_by_a_cited_date():
    dates = [entry.released.value for entry in load_catalog().entries if isinstance(entry, HubModel) and entry.released]
    assert sum(date[:4] in ("2025", "2026") for date in dates) >= 20


def test_shipped_file_has_four_sizes_to_train_from_scratch():
    sizes = [entry.parameters for entry in load_catalog().entries if isinstance(entry, ScratchModel)]
    assert len(sizes) == 4 and all(large > 2 * small for small, large in zip(sizes, sizes[1:], strict=False))


def test_shipped_hub_ids_are_unique_and_names_are_their_lower_case_tails():
    hub = [entry for entry in load_catalog().entries if isinstance(entry, HubModel)]
    assert len({entry.hub_id for entry in hub}) == len(hub)
    assert [entry.name for entry in hub] == [entry.hub_id.split("/")[1].lower() for entry in hub]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("scratch-micro", 0.24), ("scratch-tiny", 0.7), ("scratch-small", 2.0), ("scratch-medium", 5.0)],
)
def test_shipped_scratch_models_have_about_the_stated_size(name, millions):
    entry = load_catalog().get(name)
    assert isinstance(entry, ScratchModel)
    assert entry.parameters == pytest.approx(millions * 1e6, rel=0.05)


def test_scratch_parameters_count_a_tied_embedding_attention_mlp_and_norms():
    # 2048*128 embedding + 2*(4*128*128 attention + 3*128*384 MLP + 2*128 norms) + 128 last norm
    assert make_scratch().parameters == 688_768


def test_memory_is_two_bytes_a_parameter_and_unknown_without_parameters():
    assert make_hub().memory_gib_bf16 == 2.0
    assert make_hub(parameters=None).memory_gib_bf16 is None


def test_entries_are_frozen():
    with pytest.raises(ValidationError):
        make_hub().name = "other"


def test_unknown_name_gives_the_nearest_names_and_the_error_pickles():
    with pytest.raises(ConfigError, match="'Qwen3-0.6' is not in the catalog; nearest: qwen3-0.6b") as caught:
        load_catalog().get("Qwen3-0.6")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_name_near_nothing_lists_all_names():
    with pytest.raises(ConfigError, match="nearest: some-model;"):
        Catalog(entries=(make_hub(),)).get("zzzzzz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": 5}, "entries.0.hub.parameters"),
        ({"parameters": {"value": 5, "source": "https://example.org"}}, "read_on"),
        ({"license": {"value": "MIT", "source": "memory", "read_on": "2026-01-31"}}, "license.source"),
        ({"has_tool_use": {"value": 1, "source": "https://a.org", "read_on": "2026-01-31"}}, "has_tool_use.value"),
        ({"kind": "cloud"}, "entries.0"),
        ({"memory_gib": 3}, "memory_gib"),
    ],
)
def test_file_that_breaks_the_schema_names_the_field(tmp_path, change, message):
    entry = {**make_hub().model_dump(mode="json"), **change}
    with pytest.raises(ConfigError, match=message):
        load_catalog(write_catalog(tmp_path, [entry]))


def test_catalog_survives_a_round_trip_through_json(tmp_path):
    catalog = load_catalog()
    entries = catalog.model_dump(mode="json")["entries"]
    assert load_catalog(write_catalog(tmp_path, entries)) == catalog


def test_repeated_name_missing_file_and_uneven_heads_are_refused(tmp_path):
    entry = make_hub().model_dump(mode="json")
    with pytest.raises(ConfigError, match="repeated: some-model"):
        load_catalog(write_catalog(tmp_path, [entry, entry]))
    with pytest.raises(ConfigError, match="no such file"):
        load_catalog(str(tmp_path / "absent.json"))
    with pytest.raises(ValidationError, match="heads=3"):
        make_scratch(heads=3)


def test_rejection_gives_both_values():
    assert reason(make_scratch(), p99_prompt_tokens=5200) == "prompt p99 5200 tokens > context window 1024"
    assert reason(make_hub(), memory_gib=1.5) == "weights 2.000 GiB in bf16 > budget 1.500 GiB"
    assert reason(make_hub(), needs_tool_use=True) == "task needs tool use: yes, model has tool use: no"
    assert reason(make_hub(), allowed_licenses=("MIT", "BSD")) == "license Apache-2.0 not in allowed MIT, BSD"
    assert reason(make_hub(), allowed_licenses=()) == "license Apache-2.0 not in allowed (none)"


def test_all_missed_needs_are_named():
    found = reason(make_hub(), p99_prompt_tokens=5000, needs_tool_use=True)
    assert found == "prompt p99 5000 tokens > context window 4096; task needs tool use: yes, model has tool use: no"


def test_unknown_fact_rejects_only_where_a_need_compares_with_it():
    assert reason(make_hub(context_window_tokens=None)) == "unknown context window"
    assert reason(make_hub(parameters=None)) == "unknown parameters"
    unknown = make_hub(license=None, has_tool_use=None, has_chat_template=None)
    assert filter_candidates([unknown], EASY) == ([unknown], [])
    assert reason(unknown, needs_tool_use=True, allowed_licenses=("MIT",)) == "unknown tool use; unknown license"


def test_limits_are_inclusive_licenses_ignore_case_and_scratch_needs_neither_license_nor_tool_use():
    changes = {
        "p99_prompt_tokens": 4096,
        "max_model_tokens": 4096,
        "allowed_licenses": ("apache-2.0",),
        "memory_gib": 2.0,
    }
    needs = EASY.model_copy(update=changes)
    assert filter_candidates([make_hub()], needs)[1] == []
    strict = needs.model_copy(
        update={"p99_prompt_tokens": 1024, "max_model_tokens": 1024, "needs_tool_use": True, "allowed_licenses": ()}
    )
    assert filter_candidates([make_scratch()], strict) == ([make_scratch()], [])


@given(
    tokens=st.integers(0, 300_000),
    tools=st.booleans(),
    licenses=st.none() | st.lists(st.sampled_from(["Apache-2.0", "MIT", "CC-BY-NC-4.0"])).map(tuple),
    memory_gib=st.floats(0.001, 40),
)
def test_each_entry_is_either_kept_in_order_or_rejected_once_and_more_memory_never_rejects_more(
    tokens, tools, licenses, memory_gib
):
    entries = load_catalog().entries
    changes = {"p99_prompt_tokens": tokens, "needs_tool_use": tools, "allowed_licenses": licenses}
    needs = EASY.model_copy(update={**changes, "memory_gib": memory_gib})
    kept, rejected = filter_candidates(entries, needs)
    out = {item.name for item in rejected}
    assert kept == [entry for entry in entries if entry.name not in out]
    assert len(kept) + len(rejected) == len(entries)
    roomier, _ = filter_candidates(entries, needs.model_copy(update={"memory_gib": 2 * memory_gib}))
    assert set(kept) <= set(roomier)


def test_name_hub_id_and_entry_resolve_to_the_hub():
    expected = BaseSource(kind="hub", location="Qwen/Qwen3-0.6B")
    assert resolve_base("qwen3-0.6b") == resolve_base("Qwen/Qwen3-0.6B") == expected
    assert resolve_base(load_catalog().get("qwen3-0.6b")) == expected
    assert resolve_base("org/not-in-the-catalog").kind == "hub"


def test_folder_with_config_json_resolves_to_itself_and_wins_over_a_hub_id(tmp_path, monkeypatch):
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no config.json"):
        resolve_base("org/model")
    (folder / "config.json").write_text("{}")
    assert resolve_base(str(folder)) == BaseSource(kind="local", location=str(folder))
    assert resolve_base("org/model") == BaseSource(kind="local", location="org/model")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("/absent/folder", "no such folder"),
        ("./absent", "no such folder"),
        ("qwen3-06b", "nearest: qwen3-0.6b"),
        ("", "nearest"),
        ("scratch-tiny", "no weights to load"),
    ],
)
def test_base_that_cannot_be_loaded_is_refused(base, message, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        resolve_base(base)
