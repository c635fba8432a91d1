"""`understudy VERB` without Ray: exit codes, messages that name field, value, allowed and next, dry runs and help."""

import gzip
import json
import pathlib
import subprocess
import sys
import time

import pytest

from cluster.access import API_KEY_ENV, KEYS_FILE, ApiKeys
from cluster.calls import read_calls
from cluster.errors import ConfigError
from cluster.quarantine import read_quarantine
from cluster.store import Store, check_store_address
from jobs import provenance
from jobs.__main__ import _save_report, main
from jobs.convert import Conversion
from jobs.recipe import Recipe, load_recipe, work_folder
from jobs.serve import serve_args
from serving.app import ServeArgs
from training.curate import CurateConfig, curate

BASE = "select.base=scratch-small"
LLM = "upstream.0.base_url=http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("RAY_ADDRESS", "OPENAI_BASE_URL", "OPENAI_API_KEY", "UNDERSTUDY_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    # No verb of these tests may get as far as Ray.
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.fixture
def store(tmp_path) -> str:
    return str(tmp_path / "store")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def record(number: int, content: str = "hello") -> str:
    request = {"messages": [{"role": "user", "content": content}]}
    response = {"choices": [{"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}]}
    return json.dumps({"id": f"c{number}", "session": f"s{number}", "request": request, "response": response})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["convert", "recipe=nope"], ["recipe=nope", "allowed: a path ending in .toml, or one of: demo, local"]),
        (["convert", "gate.epsilom=0.1"], ["gate.epsilom: unknown key", "gate.epsilon", "understudy convert --help"]),
        (["convert", "gate.epsilon=small"], ["gate.epsilon: got 'small'", "valid number"]),
        (["convert", "fleet.max_parallel=0"], ["fleet.max_parallel: got 0", "greater than or equal to 1"]),
        (["convert", "select.base=scratch-huge"], ["'scratch-huge'", "allowed", "next"]),
        (["convert"], ["select.base: not given", "scratch-tiny, scratch-small", "hub id", "folder", "recipe=local"]),
        (["convert", BASE, "store=s3://bucket/x"], ["work: not given", "store='s3://bucket/x'", "next: work=/shared"]),
        (["convert", BASE, "work=s3://bucket/x"], ["work='s3://bucket/x'", "allowed: a folder", "next: work=/shared"]),
        (["convert", "store=file://a/b"], ["store='file://a/b'", "allowed: file:///PATH"]),
        (["convert", BASE, "finetune.gpus_per_worker=99"], ["finetune.gpus_per_worker=99", "allowed"]),
        (["convert", BASE, "fleet.max_parallel=9999"], ["fleet.max_parallel=9999", "at most"]),
        (["serve"], ["upstream", "[[upstream]]", "OPENAI_BASE_URL", "next: understudy serve"]),
        (["serve", "upstream.0.base_url=ftp://a"], ["upstream.0.base_url: got 'ftp://a'"]),
        (["serve", "upstream.0.base_ulr=http://a"], ["upstream.0.base_ulr: unknown key", "upstream.N.base_url"]),
        (["serve", "upstream.1.base_url=http://a"], ["upstream.1: given without upstream.0", "allowed"]),
        (["serve", "upstream.0.base_url=https://llm.example/v1"], ["OPENAI_API_KEY", "export OPENAI_API_KEY=..."]),
        (["serve", "upstream.0.base_url=http://localhost:8000/v1"], ["upstream.0.base_url", "this endpoint itself"]),
        (["serve", LLM, "serve.http.port=70000"], ["serve.http.port: got 70000", "65535"]),
        (["keys", "create", "bob", "role=boss"], ["role='boss'", "allowed: agent, viewer, curator, admin"]),
        (["keys", "revoke", "bob"], ["NAME='bob'", "allowed: none", "next: understudy keys list"]),
        (["keys", "list", "store=s3://bucket/x"], ["store='s3://bucket/x'", "gateway.auth=open"]),
        (["ingest", "missing.calls.jsonl"], ["missing.calls.jsonl: no such file", "allowed", "next"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_exits_2_and_is_named(capsys, store, arguments, parts):
    at = [] if any(word.startswith("store=") for word in arguments) else [f"store={store}"]
    code, out, err = run(capsys, *arguments, *at)
    assert (code, out) == (2, "")
    assert [part for part in parts if part not in err] == []
    assert "Traceback" not in err


SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("arguments", "variable"),
    [
        (["serve", f"upstream.0.base_url=https://me:{SECRET}@llm.example/v1"], "OPENAI_API_KEY"),
        (["serve", f"upstream.0.base_url=https://me:{SECRET}/x@llm.example/v1"], "OPENAI_API_KEY"),
        (["serve", f"upstream.0.base_url=https://{SECRET}@llm.example/v1"], "OPENAI_API_KEY"),
        (["serve", f"upstream.0.base_url=ftp://me:{SECRET}@llm.example/v1"], "http"),
        (["serve", f"https://me:{SECRET}@llm.example/v1"], "key=value"),
        (["convert", BASE, "work=/w", f"store=s3://KEY:{SECRET}@bucket/x"], "AWS_SECRET_ACCESS_KEY"),
        (["convert", BASE, "work=/w", f"store=s3://KEY:{SECRET}/x@bucket"], "AWS_SECRET_ACCESS_KEY"),
        (["ingest", "a.calls.jsonl", f"store=gs://{SECRET}@bucket"], "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
@pytest.mark.parametrize("flag", [[], ["--dry-run"]], ids=["", "dry run"])
def test_credentials_in_an_address_are_refused_and_not_repeated(capsys, arguments, variable, flag):
    flag = [] if arguments[0] == "ingest" else flag
    code, out, err = run(capsys, *arguments, *flag)
    assert (code, out) == (2, "")
    assert variable in err and SECRET not in err


def test_credentials_in_the_environments_address_are_refused_and_not_repeated(capsys, store, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"https://me:{SECRET}@llm.example/v1")
    code, out, err = run(capsys, "serve", "--dry-run", f"store={store}")
    assert (code, out) == (2, "") and "base_url" in err and SECRET not in err


def test_a_public_bucket_and_a_path_with_an_at_sign_carry_no_credentials():
    for address in ("gs://anonymous@bucket/x", "s3://bucket/a@b", "/data/a@b:c", "a@b"):
        assert check_store_address(address) == address


def test_verbs_that_train_nothing_need_no_base_and_no_work_folder(capsys, store, tmp_path):
    log = tmp_path / "a.calls.jsonl"
    log.write_text(record(0))
    assert run(capsys, "ingest", str(log), f"store={store}")[0] == 0
    assert run(capsys, "serve", "--dry-run", LLM, f"store={store}")[0] == 0
    assert load_recipe(["store=s3://bucket/x"]).work is None


def test_work_lies_in_a_plain_store_or_where_the_recipe_says(tmp_path):
    store, other = tmp_path / "a b", tmp_path / "other"
    by_address = load_recipe([f"store={store.as_uri()}"])
    assert by_address.store == str(store) and work_folder(by_address) == store / "work"
    assert work_folder(load_recipe([f"store={store}", f"work={other.as_uri()}"])) == other
    assert work_folder(load_recipe(["store=s3://bucket/x", f"work={other}"])) == other
    assert work_folder(Recipe(store=str(store))) == store / "work"


def test_a_taken_port_is_named_before_ray(capsys, store):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = run(capsys, "serve", LLM, f"serve.http.port={port}", f"store={store}")
    assert code == 2 and f"serve.http.port={port}: cannot listen" in err


def test_a_cluster_that_is_not_there_is_named(capsys, store, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    code, _, err = run(capsys, "convert", BASE, f"store={store}")
    assert code == 2 and "RAY_ADDRESS='127.0.0.1:9': no cluster answers" in err and "next" in err


def test_the_demo_leaves_somebodys_cluster_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("jobs.demo.run.start_provider", lambda *_: pytest.fail("something was started"))
    out = tmp_path / "demo"
    code, _, err = run(capsys, "demo", "--out", str(out))
    assert code == 2 and not out.exists()
    assert "RAY_ADDRESS='10.0.0.1:6379'" in err and "all its applications" in err and "next: unset RAY_ADDRESS" in err


@pytest.mark.parametrize(
    ("verb", "option"), [(["convert", "--dry-run", BASE], "--report"), (["demo"], "--summary")], ids=["convert", "demo"]
)
def test_an_output_that_cannot_be_written_is_told_before_the_run(capsys, tmp_path, monkeypatch, verb, option):
    monkeypatch.setattr("jobs.demo.run.run_demo", lambda *_: pytest.fail("the demo ran"))
    (tmp_path / "file").touch()
    code, out, err = run(capsys, *verb, option, str(tmp_path / "file" / "page.html"))
    assert (code, out) == (2, "") and f"{tmp_path / 'file'} is no folder; allowed" in err
    code, out, err = run(capsys, *verb, option, str(tmp_path))
    assert (code, out) == (2, "") and f"{option} {tmp_path}: is a folder; allowed" in err


def test_a_report_goes_into_a_folder_that_is_not_there_yet(capsys, store, tmp_path, monkeypatch):
    page = tmp_path / "new" / "folder" / "page.html"
    assert run(capsys, "convert", "--dry-run", BASE, f"store={store}", "--report", str(page))[0] == 0
    assert not page.parent.exists()
    monkeypatch.setattr("jobs.convert.write_conversion_report", lambda path, *_: path.write_text("page"))
    conversion = Conversion.model_construct(release="abc")
    _save_report(Store(store), conversion, page)
    assert page.read_text() == "page"


def test_a_store_in_a_submitted_jobs_own_folder_is_refused(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    code, _, err = run(capsys, "convert", "--dry-run")
    assert code == 2 and "store='store'" in err and "next: store=/shared/store" in err


def test_a_dry_run_prints_recipe_and_resources_and_touches_nothing(capsys, store):
    code, out, _ = run(capsys, "convert", "--dry-run", f"store={store}", "recipe=demo", "fleet.max_parallel=1")
    shown = json.loads(out)
    assert code == 0
    assert shown["config"]["gate"]["epsilon"] == 0.03
    assert [(part["name"], part["total_cpus"]) for part in shown["resources"]] == [
        ("base training", 1.0),
        ("fine-tunes", 1.0),
        ("validation engine", 1.0),
    ]
    assert not pathlib.Path(store).exists()


def test_a_dry_run_of_what_cannot_start_shows_it_and_exits_2(capsys, store):
    code, out, err = run(capsys, "convert", "--dry-run", BASE, f"store={store}", "fleet.max_parallel=9999")
    assert code == 2 and json.loads(out)["config"]["fleet"]["max_parallel"] == 9999 and "at most" in err


def test_serve_takes_its_llm_from_the_environment_last(capsys, store, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/env")
    _, out, _ = run(capsys, "serve", "--dry-run", f"store={store}")
    assert [one["base_url"] for one in json.loads(out)["config"]["upstream"]] == ["http://127.0.0.1:9/env"]
    _, out, _ = run(capsys, "serve", "--dry-run", f"store={store}", LLM)
    shown = json.loads(out)
    assert [one["base_url"] for one in shown["config"]["upstream"]] == ["http://127.0.0.1:9/v1"]
    assert [part["name"] for part in shown["resources"]] == ["gateway"]
    assert not pathlib.Path(store).exists()


@pytest.mark.parametrize("verb", ["convert", "serve", "ingest", "demo", "promote", "rollback", "keys"])
def test_help_lists_the_fields_a_verb_reads(capsys, verb):
    with pytest.raises(SystemExit) as exit:
        main([verb, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert "store: str = 'store'" in out and "Folder, s3:// or gs:// address" in out
    for field in (
        "gate.epsilon: float, > 0, < 1 = 0.05",
        "select.base: str | None, length >= 1 = None",
        "work: str | None = None",
    ):
        assert (field in out) == (verb in ("convert", "demo"))
    assert ("upstream.N.base_url: str" in out) == (verb == "serve")
    assert ("prices.replica_usd_per_hour: float, >= 0 = 0.0" in out) == (verb in ("convert", "serve", "demo"))
    assert ("gateway.max_temperature: float" in out) == (verb in ("convert", "serve", "demo"))
    assert ("gateway.auth" in out) == (verb == "serve")


def test_the_endpoint_gets_all_that_the_recipe_says_of_it(store):
    recipe = load_recipe([f"store={store}", LLM, "prices.replica_usd_per_hour=0.5", "gateway.max_temperature=0.3"])
    args = serve_args(recipe, ("bases/one",))
    shared = ServeArgs.model_fields.keys() & Recipe.model_fields.keys() - {"upstream"}
    assert ServeArgs.model_fields.keys() - shared == {"upstream", "bases"} and args.bases == ("bases/one",)
    assert {name: getattr(args, name) for name in shared} == {name: getattr(recipe, name) for name in shared}
    assert args.upstream == list(recipe.upstream) and args.prices.replica_usd_per_hour == 0.5


def test_there_is_one_place_for_the_price(capsys, store):
    code, _, err = run(capsys, "serve", LLM, f"store={store}", "gateway.prices.replica_usd_per_hour=1")
    assert code == 2 and "gateway.prices: unknown key" in err


def test_keys_are_shown_once_and_stored_hashed(capsys, store):
    code, key, _ = run(capsys, "keys", "create", "bob", "role=viewer", f"store={store}")
    path = pathlib.Path(f"{store}.keys/api_keys.json")
    assert code == 0 and key.strip() not in path.read_text()
    holder = ApiKeys(path).verify(key.strip())
    assert holder is not None and (holder.client, holder.role) == ("bob", "viewer")
    listed = run(capsys, "keys", "list", f"store={store}")[1]
    assert f"{holder.key_id}\tbob\tviewer\t-\t-\n" in listed and key.strip() not in listed
    assert run(capsys, "keys", "revoke", "bob", f"store={store}")[1] == "revoked: 1\n"
    assert ApiKeys(path).verify(key.strip()) is None


def test_a_key_has_a_role_a_rate_and_an_end_and_is_revoked_by_its_id(capsys, store):
    options = ("--role", "curator", "--client", "ann", "--rate-per-minute", "30", "--days", "2", f"store={store}")
    keys = [run(capsys, "keys", "create", *options)[1].strip() for _ in range(2)]
    known = ApiKeys(pathlib.Path(f"{store}.keys/api_keys.json"))
    holders = [known.verify(key) for key in keys]
    assert {(one.client, one.role, one.rate_per_minute) for one in holders} == {("ann", "curator", 30)}
    assert all(1.9 * 86_400 < one.expires_ts - time.time() < 2.1 * 86_400 for one in holders)
    assert run(capsys, "keys", "revoke", holders[0].key_id, f"store={store}")[1] == "revoked: 1\n"
    assert known.verify(keys[0]) is None and known.verify(keys[1]) is not None
    for wrong in (
        ("--client", "a", "b"),
        (),
        ("--client", "a", "--days", "0"),
        ("--client", "a", "--rate-per-minute", "0"),
    ):
        code, _, err = run(capsys, "keys", "create", *wrong, f"store={store}")
        assert code == 2 and "understudy keys: " in err and ("allowed: " in err or "next: " in err)


def test_only_an_admin_makes_keys(capsys, store, monkeypatch):
    viewer = run(capsys, "keys", "create", "--client", "eve", "--role", "viewer", f"store={store}")[1].strip()
    admin = run(capsys, "keys", "create", "--client", "ann", "--role", "admin", f"store={store}")[1].strip()
    monkeypatch.setenv("UNDERSTUDY_API_KEY", viewer)
    code, out, err = run(capsys, "keys", "create", "--client", "eve", "--role", "admin", f"store={store}")
    assert (code, out) == (2, "") and "role=viewer: this needs role admin" in err and "understudy keys create" in err
    monkeypatch.setenv("UNDERSTUDY_API_KEY", admin)
    assert run(capsys, "keys", "list", f"store={store}")[0] == 0


def test_what_no_gate_was_measured_on_is_not_moved():
    with pytest.raises(ConfigError, match="faces.move=true.*next: curate.keep_faces_person=true"):
        load_recipe(["faces.move=true"])
    assert load_recipe(["faces.move=true", "curate.keep_faces_person=true"]).faces.move
    assert not load_recipe(["curate.keep_faces_person=true"]).faces.move


@pytest.mark.parametrize(
    "path", ["/v1/files/../models", "/v1/", "v1/embeddings", "/v1/a//b", "/v1/%61", "/v1/chat/completions"]
)
def test_paths_that_pass_through_are_plain_and_not_the_gateways_own(path):
    with pytest.raises(ConfigError, match="gateway.passthrough.*allowed"):
        load_recipe([f'gateway.passthrough=["{path}"]'])


def test_bad_records_are_quarantined_and_the_rest_is_read(capsys, store, tmp_path):
    logs = {
        "cut.calls.jsonl.gz": gzip.compress("\n".join(record(n) for n in range(400)).encode())[:-200],
        "truncated.calls.jsonl": f"{record(1000)}\n{record(1001)[:-30]}\n".encode(),
        "silent.calls.jsonl": f'{{"id": "x", "request": {{"model": "m"}}}}\n{record(2000)}\n'.encode(),
    }
    for name, content in logs.items():
        (tmp_path / name).write_bytes(content)
    code, out, _ = run(capsys, "ingest", *(str(tmp_path / name) for name in logs), f"store={store}")
    counts = json.loads(out)
    assert code == 0
    rows = {(pathlib.Path(row.source).name, row.reason) for row in read_quarantine(Store(store))}
    assert rows == {
        ("cut.calls.jsonl.gz", "corrupt file"),
        ("truncated.calls.jsonl", "not JSON"),
        ("silent.calls.jsonl", "no messages"),
    }
    assert counts["quarantined"] == 3
    ids = {call.call_id for call in read_calls(Store(store))}
    assert {"c1000", "c2000"} <= ids and len(ids) == counts["ingested"]


def test_a_huge_prompt_is_stored_whole_and_left_out_of_training_with_its_reason(capsys, store, tmp_path):
    prompt = "word " * 60_000
    log = tmp_path / "a.calls.jsonl"
    log.write_text("\n".join([record(0, prompt), *(record(n, f"hello {n}") for n in range(1, 20))]))
    code, out, _ = run(capsys, "ingest", str(log), f"store={store}")
    assert (code, json.loads(out)["ingested"]) == (0, 20)
    (stored,) = read_calls(Store(store), {"c0"})
    assert stored.request["messages"][0]["content"] == prompt and len(prompt) == 300_000
    snapshot = curate(Store(store), CurateConfig())
    reason = "prompt longer than 100000 characters"
    assert snapshot.counts.dropped == {reason: 1}
    (row,) = read_quarantine(Store(store))
    assert row.reason == reason and "call c0: 300" in row.detail


def test_the_configuration_beside_a_release_says_what_made_it(store, monkeypatch):
    monkeypatch.undo()
    recipe = load_recipe([f"store={store}", "finetune.seed=5"])
    path = provenance.save_config(Store(store), "abc", recipe)
    beside = Store(store).read_json(path)
    assert path == "releases/abc.config.json"
    assert beside["config"] == recipe.model_dump(mode="json")
    assert beside["seeds"] == {"finetune.seed": 5, "pretrain.seed": 0}
    assert beside["packages"]["ray"] and beside["packages"]["pydantic"]


def test_the_commit_comes_from_the_checkout_or_from_whoever_packed_the_code(tmp_path, monkeypatch):
    monkeypatch.setenv(provenance.GIT_SHA_ENV, "f" * 40)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.describe(load_recipe([]))["git_sha"] == "f" * 40
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "-qm", "a", "--allow-empty"], check=True)
    assert len(provenance.describe(load_recipe([]))["git_sha"]) == 40
    assert provenance.describe(load_recipe([]))["git_sha"] != "f" * 40


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["promote", "0" * 64], "admin"),
        (["rollback"], "admin"),
        (["convert", "recipe=local"], "curator"),
        (["forget", "--client", "x"], "admin"),
        (["compact"], "curator"),
        (["keys", "rotate"], "admin"),
        (["keys", "retire"], "admin"),
        (["calls", "show", "c"], "curator"),
    ],
)
def test_a_viewers_key_opens_none_of_these(tmp_path, monkeypatch, capsys, words, needed):
    store = tmp_path / "store"
    key = ApiKeys(tmp_path / "store.keys" / KEYS_FILE).create("somebody", "viewer")
    monkeypatch.setenv(API_KEY_ENV, key)
    assert main([*words, f"store={store}"]) == 2
    assert f"needs role {needed}" in capsys.readouterr().err
    assert not store.exists() or not list(store.iterdir())
