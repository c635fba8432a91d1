"""`understudy catalog`: what is listed, and what each filter leaves out."""

import argparse
import json

from jobs.catalog import add_verb, format_table, list_models
from training.catalog import HubModel, ScratchModel, load_catalog


def run(capsys, *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers(
        parser_class=lambda sections=(), examples=(), **options: argparse.ArgumentParser(**options)
    )
    add_verb(verbs)
    options = parser.parse_args(["catalog", *arguments])
    options.run(options)
    return capsys.readouterr().out


def test_without_filters_every_entry_is_listed_even_where_facts_are_unknown(capsys):
    lines = run(capsys).splitlines()
    assert len(lines) == len(load_catalog().entries) + 2
    assert any(" - " in line for line in lines)
    assert lines[-1].startswith(f"{len(load_catalog().entries)} of")


def test_json_gives_the_address_and_date_of_every_fact(capsys):
    found = json.loads(run(capsys, "--json", "--max-parameters", "1e9", "--license", "apache-2.0"))
    qwen = next(one for one in found if one["name"] == "qwen3.5-0.8b")
    assert qwen["license"]["source"].startswith("https://") and qwen["license"]["read_on"]


def test_filters_keep_only_what_is_known_to_pass():
    for entry in list_models(max_parameters=2e9, min_context=100_000, needs_tool_use=True, licenses=("APACHE-2.0",)):
        assert isinstance(entry, HubModel)
        assert entry.parameters.value <= 2e9 and entry.context_window_tokens.value >= 100_000
        assert entry.has_tool_use.value and entry.license.value == "Apache-2.0"


def test_an_unknown_fact_is_left_out_only_where_it_is_asked_for():
    names = {entry.name for entry in load_catalog().entries if isinstance(entry, HubModel) and entry.license is None}
    assert names and names <= {entry.name for entry in list_models(min_context=0)}
    assert not names & {entry.name for entry in list_models(licenses=("Apache-2.0", "MIT"))}


def test_scratch_entries_pass_licence_and_tool_use():
    kept = list_models(licenses=("MIT",), needs_tool_use=True, max_parameters=1e7)
    assert [type(entry) for entry in kept] == [ScratchModel] * 4


def test_table_columns_are_aligned():
    header, *rows = format_table(list_models()).splitlines()
    assert {row.index("  ") >= 0 for row in rows} == {True}
    assert header.startswith("name ") and all(len(row) <= len(header) + 12 for row in rows)
