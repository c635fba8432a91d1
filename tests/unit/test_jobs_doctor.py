"""`understudy doctor`: each area with something broken in it, what is said to do, and that nothing is written or shown.

The LLMs are loopback servers of this test's own; vLLM and Ray's two addresses are stood in for where a test names them.
"""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_vault import FakeVault
from fakes import ADAPTER, make_specialist, promote_release

from cluster.access import API_KEY_ENV, KEYS_FILE, ApiKeys, keys_folder, load_pseudonym_key
from cluster.calls import write_calls
from cluster.errors import ConfigError
from cluster.kms import CONTENT_KEY_FILE, KMS_ENV
from cluster.records import AgentCall
from cluster.store import Store
from jobs.__main__ import main
from jobs.doctor.check import Check
from jobs.doctor.cluster import check_cluster
from jobs.doctor.engine import Probed, check_engine
from jobs.doctor.journal import check_journal
from jobs.doctor.keys import check_keys
from jobs.doctor.llm import check_llm
from jobs.doctor.machine import check_machine
from jobs.doctor.packages import check_packages, installed_version
from jobs.doctor.store import check_store
from jobs.recipe import load_recipe

KEY = "sk-marker-of-a-secret"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    for name in list(os.environ):
        if name.startswith(("RAY_AUTH", "RAY_ADDRESS", "OPENAI_", "UNDERSTUDY_", "VLLM_", "VAULT_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    made = Store(str(tmp_path / "store"))
    promote_release(made, tmp_path / "scratch", make_specialist())
    return made


def find(checks: Iterator[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    assert (found.status == "ok") == (not found.next), "what is not ok says what to do, and nothing else does"
    return found


def recipe(store: Store | str, *words: str) -> Any:
    return load_recipe([f"store={store.uri if isinstance(store, Store) else store}", *words])


def served(answer: tuple[int, bytes]) -> Iterator[tuple[str, list[Any]]]:
    seen: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.path, self.headers.get("Authorization")))
            status, body = answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- the store


def test_a_whole_store_is_ok_and_stays_as_it_is(store: Store) -> None:
    before = sorted(pathlib.Path(store.uri).rglob("*"))
    checks = list(check_store(recipe(store), may_write=False))
    assert {check.status for check in checks} == {"ok"}
    assert "1 specialists" in find(iter(checks), "served release").found
    assert find(iter(checks), "manifests").found == "2 artifacts, all of their files there"
    assert find(check_store(recipe(store), may_write=True), "write").found.endswith("read back and removed")
    assert sorted(pathlib.Path(store.uri).rglob("*")) == before


def test_a_store_that_is_not_there_is_not_made(tmp_path: pathlib.Path) -> None:
    (check,) = check_store(recipe(str(tmp_path / "none")), may_write=True)
    assert check.status == "ok" and not (tmp_path / "none").exists()


def _lose_current(store: Store) -> None:
    store.write_bytes("CURRENT", b"{")


def _lose_release(store: Store) -> None:
    store.delete(store.list("releases")[0])


def _alter_release(store: Store) -> None:
    path = store.list("releases")[0]
    store.write_json(path, {**store.read_json(path), "snapshot": "another"})


def _lose_adapter(store: Store) -> None:
    store.delete(f"{ADAPTER}/manifest.json")


@pytest.mark.parametrize("harm", [_lose_current, _lose_release, _alter_release, _lose_adapter])
def test_a_served_release_that_cannot_be_served_is_told(store: Store, harm: Callable[[Store], None]) -> None:
    harm(store)
    check = find(check_store(recipe(store), may_write=False), "served release")
    assert check.status == "failed" and f"store={store.uri}" in check.next


def test_files_that_a_manifest_names_and_that_are_gone_are_told(store: Store) -> None:
    store.delete(f"{ADAPTER}/weights")
    check = find(check_store(recipe(store), may_write=False), "manifests")
    assert check.status == "failed" and check.found == f"{ADAPTER}/weights is missing"
    store.write_bytes(f"{ADAPTER}/manifest.json", b"[]")
    assert "is damaged" in find(check_store(recipe(store), may_write=False), "manifests").found


def test_a_file_in_the_place_of_a_store_is_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "store").write_text("")
    check = find(check_store(recipe(str(tmp_path / "store")), may_write=False), "read")
    assert check.status == "failed"


# --- keys


def test_keys_that_others_can_read_are_told_with_what_mends_it(store: Store) -> None:
    folder = keys_folder(store.uri)
    assert folder is not None
    ApiKeys(folder / KEYS_FILE).create("ann", "viewer")
    load_pseudonym_key(store.uri)
    assert {check.status for check in check_keys(recipe(store))} == {"ok"}
    for path, name in (
        (folder, "folder"),
        (folder / KEYS_FILE, "API keys"),
        (folder / "pseudonym.key", "pseudonym key"),
    ):
        mode = path.stat().st_mode
        path.chmod(0o755)
        check = find(check_keys(recipe(store)), name)
        assert check.status == "failed" and f"chmod {'700' if path == folder else '600'} {path}" in check.next
        path.chmod(mode)
    (folder / KEYS_FILE).write_text("{")
    assert find(check_keys(recipe(store)), "API keys").status == "failed"


def test_an_endpoint_that_nobody_or_everybody_can_call_is_a_warning(store: Store) -> None:
    assert "keys create" in find(check_keys(recipe(store)), "API keys").next
    assert find(check_keys(recipe(store, "gateway.auth=open")), "API keys").status == "warning"


def test_looking_makes_no_key(store: Store) -> None:
    list(check_keys(recipe(store)))
    folder = keys_folder(store.uri)
    assert folder is not None and not folder.exists()


def test_a_key_of_this_person_that_is_none_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_ENV, "us-" + "0" * 76)
    check = find(check_keys(recipe(store)), API_KEY_ENV)
    assert check.status == "failed" and f"unset {API_KEY_ENV}" in check.next


def _capture(store: Store) -> None:
    facts = {"call_id": "c", "ts": 1.0, "client_id": "c", "agent": "a", "session_id": "s", "step": 0}
    write_calls(store, [AgentCall(**facts, request={}, response=None, latency_ms=1.0)])  # type: ignore[arg-type]


def test_a_content_key_of_another_store_is_told(store: Store) -> None:
    folder = keys_folder(store.uri)
    assert folder is not None
    _capture(store)
    assert "opens what is stored" in find(check_keys(recipe(store)), "content key").found
    other = Store(f"{store.uri}-2")
    _capture(other)
    (folder / CONTENT_KEY_FILE).write_bytes((keys_folder(other.uri) / CONTENT_KEY_FILE).read_bytes())  # type: ignore[operator]
    check = find(check_keys(recipe(store)), "content key")
    assert check.status == "failed" and "not the key file that this content was encrypted under" in check.found
    (folder / CONTENT_KEY_FILE).unlink()
    assert find(check_keys(recipe(store)), "content key").status == "failed"


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"a": 1}'])
def test_key_material_that_is_damaged_is_told(store: Store, text: bytes) -> None:
    _capture(store)
    (path,) = pathlib.Path(store.uri).rglob("_KEY_MATERIAL*")
    path.write_bytes(text)
    check = find(check_keys(recipe(store)), "content key")
    assert check.status == "failed" and "no stored file's key can be read" in check.found


def test_a_vault_that_refuses_is_told_without_its_token(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeVault("content", "right") as vault:
        monkeypatch.setenv(KMS_ENV, "vault:content")
        monkeypatch.setenv("VAULT_ADDR", vault.address)
        monkeypatch.setenv("VAULT_TOKEN", KEY)
        check = find(check_keys(recipe(store)), "content key")
        assert check.status == "failed" and KEY not in check.model_dump_json()
        monkeypatch.setenv("VAULT_TOKEN", "right")
        assert find(check_keys(recipe(store)), "content key").status == "ok"


# --- the journal


def test_a_journal_that_others_can_open_is_told(tmp_path: pathlib.Path, store: Store) -> None:
    words = ("capture.durability=sync", f"capture.journal={tmp_path / 'journal'}")
    assert "made by the first" in find(check_journal(recipe(store, *words)), "folder").found
    assert not (tmp_path / "journal").exists()
    (tmp_path / "journal" / "aside").mkdir(parents=True)
    (tmp_path / "journal").chmod(0o755)
    (tmp_path / "journal" / "aside" / "1.journal").touch()
    check = find(check_journal(recipe(store, *words)), "folder")
    assert check.status == "failed" and check.next == f"chmod 700 {tmp_path / 'journal'}"
    assert find(check_journal(recipe(store, *words)), "set aside").status == "warning"


# --- the LLM


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        ((200, b'{"data": [{"id": "big"}, {"id": "small"}]}'), "ok", "lists 2 models with the key"),
        ((401, b'{"error": {"message": "no"}}'), "failed", "answered 401"),
        ((403, b"no"), "failed", "answered 403"),
        ((404, b'{"error": {"message": "no such path"}}'), "warning", "answered 404"),
        ((302, b""), "failed", "answered 302"),
        ((500, b"{}"), "failed", "answered 500"),
        ((200, b"<html>"), "failed", "no JSON object"),
    ],
)
def test_an_endpoint_is_asked_for_its_models_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, bytes], status: str, said: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for url, seen in served(answer):
        check = find(check_llm(recipe(store, f"upstream.0.base_url={url}")), "upstream.0")
        assert (check.status, said in check.found) == (status, True), check
        assert seen == [("/v1/models", f"Bearer {KEY}")], "nothing else is asked, so nothing is spent"
        assert KEY not in check.model_dump_json()


def test_a_model_that_the_endpoint_does_not_list_is_a_warning(store: Store) -> None:
    for url, _ in served((200, b'{"data": [{"id": "big"}]}')):
        words = (f"upstream.0.base_url={url}", "upstream.0.model=bigg")
        check = find(check_llm(recipe(store, *words)), "upstream.0")
        assert check.status == "warning" and "big" in check.next


def test_no_endpoint_a_dead_one_and_one_without_a_key_are_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(check_llm(recipe(store)), "upstream").status == "warning"
    dead = find(check_llm(recipe(store, "upstream.0.base_url=http://127.0.0.1:9/v1")), "upstream.0")
    assert dead.status == "failed" and "cannot be reached" in dead.found
    unset = find(check_llm(recipe(store, "upstream.0.base_url=https://llm.example/v1")), "upstream.0")
    assert unset.status == "failed" and unset.next == "export OPENAI_API_KEY=..."


# --- packages and the engine


def test_versions_that_differ_are_told_by_name(tmp_path: pathlib.Path) -> None:
    pins = tmp_path / "requirements-cpu.txt"
    pins.write_text("numpy==0.0.1\nno-such-package==1\nray==2.60.0\n")
    check = find(check_packages(pins), "tested set")
    assert check.status == "warning" and "no-such-package is missing" in check.found
    assert f"numpy {installed_version('numpy')} instead of 0.0.1" in check.found and "ray" not in check.found

    def another(name: str) -> str | None:
        return {"ray": "2.9.0", "peft": None}.get(name, installed_version(name))

    declared = find(check_packages(pins, another), "declared")
    assert (
        declared.status == "failed"
        and "peft is missing" in declared.found
        and "ray 2.9.0 is not ==2.60.0" in declared.found
    )
    assert find(check_packages(tmp_path / "none"), "declared").status == "ok"


def test_builds_of_one_version_are_that_version(tmp_path: pathlib.Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("torch==2.13.0\n")
    assert find(check_packages(pins, lambda name: "2.13.0+cpu"), "tested set").status == "ok"


@pytest.mark.parametrize(
    ("probed", "status", "said"),
    [
        (Probed(0, 'noise\n{"version": "1", "device": "cpu"}\n', ""), "ok", "1 on cpu"),
        (Probed(0, '{"version": "1", "device": "cuda"}', ""), "warning", "specialists.device=cpu"),
        (Probed(0, '{"version": "1", "device": ""}', ""), "warning", "no device"),
        (Probed(1, "", "Traceback\nModuleNotFoundError: No module named 'vllm'\n"), "failed", "No module named"),
        (Probed(-4, "", ""), "failed", "SIGILL"),
    ],
)
def test_an_engine_is_told_by_what_its_import_gave(store: Store, probed: Probed, status: str, said: str) -> None:
    check = find(check_engine(recipe(store), lambda: probed), "vLLM")
    assert (check.status, said in check.found) == (status, True), check


def test_what_would_be_ignored_or_would_not_fit_is_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = Probed(0, '{"version": "1", "device": "cpu"}', "")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    checks = list(check_engine(recipe(store, "specialists.kv_cache_gib=100000"), lambda: probed))
    assert find(iter(checks), "CPU environment").status == find(iter(checks), "CPU memory").status == "warning"


# --- Ray


def _refuse(address: str) -> None:
    raise ConfigError(f"{address}: no cluster answers there; next: ray status")


def test_each_address_is_asked_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    ways: Any = {
        "reach_head": lambda at: asked.append(("head", at)),
        "reach_jobs": lambda at: asked.append(("jobs", at)),
    }
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert find(check_cluster(None, **ways), "cluster").status == "ok"
    assert find(check_cluster("http://10.0.0.1:8265", **ways), "cluster").status == "ok"
    assert asked == [("head", "10.0.0.1:6379"), ("jobs", "http://10.0.0.1:8265")]
    check = find(check_cluster(None, reach_head=_refuse), "cluster")
    assert check.status == "failed" and check.next == "ray status"
    monkeypatch.delenv("RAY_ADDRESS")
    assert "none is named" in find(check_cluster(None, reach_head=_refuse), "cluster").found


def test_a_token_that_is_absent_or_open_to_others_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: Any = {"reach_head": lambda _: None}
    assert find(check_cluster(None, **ways), "token").status == "ok"
    assert find(check_cluster("10.0.0.1:6379", **ways), "token").status == "warning"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find(check_cluster(None, **ways), "token").status == "failed"
    (tmp_path / "token").write_text(KEY)
    (tmp_path / "token").chmod(0o644)
    check = find(check_cluster(None, **ways), "token")
    assert check.status == "warning" and check.next == f"chmod 600 {tmp_path / 'token'}" and KEY not in check.found
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find(check_cluster("10.0.0.1:6379", **ways), "token").status == "warning"


# --- the verb


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither vLLM nor Ray is asked: each takes seconds."""
    for name in ("engine.check_engine", "cluster.check_cluster"):
        monkeypatch.setattr(f"jobs.doctor.{name}", lambda *_: iter(()))


@pytest.mark.usefixtures("quiet")
def test_the_verb_exits_1_only_where_something_failed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for url, _ in served((200, b'{"data": []}')):
        words = [f"store={store.uri}", f"upstream.0.base_url={url}"]
        assert main(["doctor", *words]) == 0
        out = capsys.readouterr().out
        assert "ok      store: read" in out and "0 failed" in out and "next: understudy keys create" in out
        store.write_bytes("CURRENT", b"{")
        assert main(["doctor", "--json", *words]) == 1
        out, err = capsys.readouterr()
        told = json.loads(out)
        assert told["counts"]["failed"] == 1 and "failed  store: served release" in err
        assert {one["area"] for one in told["checks"]} >= {"machine", "packages", "store", "keys", "journal", "LLM"}
    assert main(["doctor", "gate.epsilom=1"]) == 2


def test_the_machine_of_this_test_is_looked_at(store: Store) -> None:
    checks = {check.name: check for check in check_machine(recipe(store))}
    assert checks["Python"].status == "ok" and {"cores", "memory", "shared memory", "GPU", "open files"} <= set(checks)
    wide = {check.name: check for check in check_machine(recipe(store, "gateway.max_ongoing=100000000"))}
    assert wide["open files"].status == "warning" or wide["open files"].found == "no limit"
