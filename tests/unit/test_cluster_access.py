"""API keys verify only as issued; pseudonyms are stable, keyed and told apart by kind; keys rest beside the store."""

import concurrent.futures
import json
import os
import pathlib
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.access import (
    API_KEY_ENV,
    KEYS_FILE,
    PSEUDONYM_KEY_ENV,
    ROLES,
    ApiKeys,
    Pseudonyms,
    keys_folder,
    load_pseudonym_key,
    require_role,
)
from cluster.errors import ConfigError

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def _no_key_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PSEUDONYM_KEY_ENV, raising=False)
    monkeypatch.delenv(API_KEY_ENV, raising=False)


def holder_of(keys: ApiKeys, key: str) -> tuple[str, str] | None:
    found = keys.verify(key)
    return found and (found.client, found.role)


def test_a_created_key_names_its_holder(tmp_path: pathlib.Path) -> None:
    key = ApiKeys(tmp_path / "keys" / "api_keys.json").create("billing", "agent")
    assert key.startswith("us-") and len(key) >= 64
    assert holder_of(ApiKeys(tmp_path / "keys" / "api_keys.json"), key) == ("billing", "agent")


def test_the_file_holds_no_key_and_is_private(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "api_keys.json"
    key = ApiKeys(path).create("billing", "agent")
    secret = key[len("us-") + 12 :]
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["api_keys.json"]


def test_equal_holders_get_different_keys_and_salts(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "api_keys.json"
    keys = ApiKeys(path)
    assert keys.create("billing", "agent") != keys.create("billing", "agent")
    assert len({entry["salt"] for entry in json.loads(path.read_text())["keys"].values()}) == 2


@pytest.mark.parametrize("change", [lambda k: k[:-1], lambda k: k + "0", lambda k: k.upper(), lambda k: k[3:]])
def test_nothing_near_a_key_is_valid(tmp_path: pathlib.Path, change) -> None:
    keys = ApiKeys(tmp_path / "api_keys.json")
    key = keys.create("billing", "agent")
    assert keys.verify(change(key)) is None


@given(st.text(max_size=400))
def test_made_up_keys_are_not_valid(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    keys = ApiKeys(tmp_path_factory.getbasetemp() / "api_keys.json")
    assert keys.verify(text) is None and keys.verify("us-" + text) is None


def test_a_reader_notices_new_and_revoked_keys(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "api_keys.json"
    writer, reader = ApiKeys(path), ApiKeys(path)
    first, second = writer.create("billing", "agent"), writer.create("owner", "admin")
    assert reader.verify(first) is not None
    assert writer.revoke("billing") == 1
    assert reader.verify(first) is None
    assert holder_of(reader, second) == ("owner", "admin")


def test_one_key_of_a_client_is_revoked_by_its_id(tmp_path: pathlib.Path) -> None:
    keys = ApiKeys(tmp_path / "api_keys.json")
    first, second = keys.create("billing", "agent"), keys.create("billing", "agent")
    found = keys.verify(first)
    assert found is not None and keys.revoke(found.key_id) == 1
    assert keys.verify(first) is None and keys.verify(second) is not None
    assert [one.key_id for one in keys.holders()] == [keys.verify(second).key_id]  # type: ignore[union-attr]


def test_a_key_ends_when_it_was_made_to(tmp_path: pathlib.Path) -> None:
    now = [1_000.0]
    keys = ApiKeys(tmp_path / "api_keys.json", clock=lambda: now[0])
    key = keys.create("billing", "agent", rate_per_minute=3, expires_ts=2_000.0)
    found = keys.verify(key)
    assert found is not None and (found.rate_per_minute, found.expires_ts) == (3, 2_000.0)
    now[0] = 2_000.0
    assert keys.verify(key) is None
    with pytest.raises(ConfigError, match="past"):
        keys.create("billing", "agent", expires_ts=2_000.0)
    with pytest.raises(ConfigError, match="rate_per_minute=0"):
        keys.create("billing", "agent", rate_per_minute=0)


def test_keys_made_before_rates_and_ends_were_kept_stay_valid(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "api_keys.json"
    key = ApiKeys(path).create("billing", "agent")
    entries = json.loads(path.read_text())["keys"]
    old = {key_id: {k: e[k] for k in ("client", "role", "salt", "sha256")} for key_id, e in entries.items()}
    path.write_text(json.dumps({"keys": old}))
    assert holder_of(ApiKeys(path), key) == ("billing", "agent")


def test_keys_made_at_the_same_time_are_all_there(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "api_keys.json"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda number: ApiKeys(path).create(f"client-{number}", "agent"), range(24)))
    assert all(ApiKeys(path).verify(key) for key in keys)


def test_roles_are_denied_what_they_are_not_given() -> None:
    assert ROLES["agent"].isdisjoint({"read_metadata", "read_content", "administer"})
    assert ROLES["viewer"] == {"read_metadata"}
    assert ROLES["curator"].isdisjoint({"call_models", "administer"})


ABLE = {
    "agent": {"agent", "admin"},
    "viewer": {"viewer", "curator", "admin"},
    "curator": {"curator", "admin"},
    "admin": {"admin"},
}


@pytest.mark.parametrize("needed", list(ROLES))
@pytest.mark.parametrize("role", list(ROLES))
def test_the_keys_role_decides_at_the_terminal(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, role, needed
) -> None:
    store = str(tmp_path / "store")
    monkeypatch.setenv(API_KEY_ENV, ApiKeys(tmp_path / "store.keys" / KEYS_FILE).create("ann", role))
    if role in ABLE[needed]:
        assert require_role(store, needed) == role
    else:
        with pytest.raises(
            ConfigError, match=f"role={role}: this needs role {needed}.*next: .*keys create --role {needed}"
        ):
            require_role(store, needed)


def test_who_holds_the_keys_is_admin_and_everybody_else_viewer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = str(tmp_path / "store")
    assert require_role(store, "admin") == "admin"
    key = ApiKeys(tmp_path / "store.keys" / KEYS_FILE).create("ann", "admin")
    assert require_role(store, "curator") == "admin"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert require_role(store, "viewer") == "viewer"
    monkeypatch.setenv(API_KEY_ENV, key)
    with pytest.raises(ConfigError, match="role=viewer"):
        require_role(store, "curator")


def test_a_key_that_is_none_is_no_role(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_ENV, "us-" + "0" * 76)
    with pytest.raises(ConfigError, match=f"{API_KEY_ENV}: is no valid key"):
        require_role(str(tmp_path / "store"), "viewer")


def test_a_remote_stores_admin_has_its_pseudonym_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert require_role("s3://bucket/store", "viewer") == "viewer"
    with pytest.raises(ConfigError, match="role=viewer"):
        require_role("s3://bucket/store", "admin")
    monkeypatch.setenv(PSEUDONYM_KEY_ENV, KEY.hex())
    assert require_role("s3://bucket/store", "admin") == "admin"


def test_wrong_roles_nameless_holders_and_damaged_files_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "api_keys.json"
    with pytest.raises(ConfigError, match="role='root'.*agent"):
        ApiKeys(path).create("billing", "root")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name"):
        ApiKeys(path).create("", "agent")
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not a key file"):
        ApiKeys(path).verify("us-" + "0" * 76)


@given(st.text(), st.text(), st.text(), st.text())
def test_pseudonyms_are_equal_only_for_equal_kind_and_value(kind: str, value: str, kind2: str, value2: str) -> None:
    names = Pseudonyms(KEY)
    assert names.of(kind, value) == Pseudonyms(KEY).of(kind, value)
    assert (names.of(kind, value) == names.of(kind2, value2)) == ((kind, value) == (kind2, value2))


def test_kind_and_value_do_not_run_into_each_other() -> None:
    names = Pseudonyms(KEY)
    assert names.of("a", "b:c") != names.of("a:b", "c")


def test_clients_have_no_session_in_common() -> None:
    names = Pseudonyms(KEY)
    assert names.session_of("a", "1") == Pseudonyms(KEY).session_of("a", "1")
    assert len({names.session_of(*pair) for pair in (("a", "1"), ("b", "1"), ("a", '1", "b'), ('a", "1', "b"))}) == 4


def test_pseudonyms_depend_on_the_key_and_hide_the_name() -> None:
    name = Pseudonyms(KEY).of("client", "billing")
    assert name != Pseudonyms(KEY[::-1]).of("client", "billing")
    assert len(name) == 20 and int(name, 16) >= 0 and "billing" not in name


def test_the_pseudonym_key_is_made_once_beside_the_store(tmp_path: pathlib.Path) -> None:
    store = tmp_path / "store"
    key = load_pseudonym_key(str(store))
    path = tmp_path / "store.keys" / "pseudonym.key"
    assert load_pseudonym_key(str(store)) == key and len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not store.exists()


def test_the_environment_comes_before_the_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PSEUDONYM_KEY_ENV, KEY.hex())
    assert load_pseudonym_key(str(tmp_path / "store")) == KEY
    assert load_pseudonym_key("s3://bucket/store") == KEY
    assert not (tmp_path / "store.keys").exists()


def test_a_remote_store_needs_the_variable() -> None:
    with pytest.raises(ConfigError, match=PSEUDONYM_KEY_ENV):
        load_pseudonym_key("s3://bucket/store")


@pytest.mark.parametrize("text", ["", "zz", "00" * 31, "00" * 65])
def test_what_is_no_key_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PSEUDONYM_KEY_ENV, text)
    with pytest.raises(ConfigError, match=PSEUDONYM_KEY_ENV):
        load_pseudonym_key("s3://bucket/store")


def test_a_key_that_others_can_read_is_refused(tmp_path: pathlib.Path) -> None:
    load_pseudonym_key(str(tmp_path / "store"))
    path = tmp_path / "store.keys" / "pseudonym.key"
    os.chmod(path, 0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_pseudonym_key(str(tmp_path / "store"))


def test_keys_lie_beside_a_local_store_never_inside(tmp_path: pathlib.Path) -> None:
    assert keys_folder(str(tmp_path / "store")) == tmp_path / "store.keys"
    assert keys_folder(f"file://{tmp_path}/store") == tmp_path / "store.keys"
    assert keys_folder("gs://bucket/store") is None
