"""Content at rest: who has no key reads no word and still counts; master keys rotate without rewriting a file."""

from __future__ import annotations

import json
import pathlib
import pickle
import stat

import duckdb
import pyarrow as pa
import pytest
from fake_vault import FakeVault

from cluster.access import Pseudonyms, keys_folder, load_pseudonym_key
from cluster.calls import CONTENT_COLUMNS, read_call_columns, read_calls, write_calls
from cluster.content_keys import ContentKeys
from cluster.errors import ConfigError, KeyAccessError, StoreError
from cluster.kms import KMS_ENV, FileKms, KmsConfig, VaultKms, find_kms, version_of
from cluster.quarantine import QuarantineRow, read_quarantine, write_quarantine
from cluster.records import AgentCall
from cluster.store import Store

SECRET = "my sister Zebulina lives here"


def _call(number: int = 0) -> AgentCall:
    answer = {"choices": [{"message": {"role": "assistant", "content": f"{SECRET}, answered"}}], "model": "m"}
    return AgentCall(
        call_id=f"c{number}", ts=1_700_000_000.0 + number, client_id="p", agent="a", session_id="s", step=0,
        request={"messages": [{"role": "user", "content": SECRET}]}, response=answer,
        outcome={"text": SECRET}, label=SECRET, cost_usd=0.5,
    )  # fmt: skip


def _key_file(store: Store) -> pathlib.Path:
    folder = keys_folder(store.uri)
    assert folder is not None
    return folder / "content.keys"


def _without_key(store: Store) -> Store:
    """The same store for somebody whose key file is away."""
    _key_file(store).rename(_key_file(store).with_suffix(".away"))
    return Store(store.uri)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch):
    with FakeVault("agent-content", token="t0p") as server:
        monkeypatch.setenv("VAULT_ADDR", server.address)
        monkeypatch.setenv("VAULT_TOKEN", "t0p")
        monkeypatch.setenv(KMS_ENV, "vault:agent-content")
        yield server


def test_no_file_of_the_store_holds_what_was_said(store):
    write_calls(store, [_call()])
    write_quarantine(store, "ingest", [QuarantineRow(source="/home/Zebulina", line=1, reason="r", detail="Zebulina")])
    files = [path for path in pathlib.Path(store.uri).rglob("*") if path.is_file()]
    assert len(files) == 4
    for file in files:
        assert b"Zebulina" not in file.read_bytes(), file.name


def test_who_has_no_key_counts_and_prices_and_reads_nothing(store):
    (path,) = write_calls(store, [_call(0), _call(1)])
    viewer = _without_key(store)
    assert read_call_columns(viewer, ["cost_usd"])["cost_usd"].to_pylist() == [0.5, 0.5]
    assert duckdb.sql(f"select sum(cost_usd), any_value(model) from '{store.uri}/{path}'").fetchall() == [(1.0, "m")]
    for column in CONTENT_COLUMNS:
        with pytest.raises(KeyAccessError, match="content cannot be read"):
            read_call_columns(viewer, [column])
        with pytest.raises(duckdb.Error):
            duckdb.sql(f"select {column} from '{store.uri}/{path}'").fetchall()


def test_who_has_no_key_never_makes_another_one_by_reading(store):
    write_calls(store, [_call()])
    with pytest.raises(KeyAccessError):
        read_calls(_without_key(store))
    assert not _key_file(store).exists()


def test_what_was_written_comes_back_with_the_key(store):
    write_calls(store, [_call()])
    assert read_calls(Store(store.uri)) == [_call()]
    write_quarantine(store, "ingest", [QuarantineRow(source="f", line=1, reason="r", detail="d")])
    assert [row.detail for row in read_quarantine(store)] == ["d"]


def test_another_key_file_is_told_from_the_right_one(store, tmp_path):
    write_calls(store, [_call()])
    stranger = Store(str(tmp_path / "other"))
    write_calls(stranger, [_call()])
    _key_file(stranger).replace(_key_file(store))
    with pytest.raises(KeyAccessError, match="not the key file"):
        read_calls(Store(store.uri))


def test_the_key_file_is_its_owners_alone(store):
    write_calls(store, [_call()])
    assert stat.S_IMODE(_key_file(store).stat().st_mode) == 0o600
    _key_file(store).chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_calls(Store(store.uri))


def test_a_changed_byte_of_content_is_noticed(store):
    (path,) = write_calls(store, [_call()])
    file = pathlib.Path(store.uri) / path
    data = bytearray(file.read_bytes())
    data[60] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(StoreError):
        read_calls(store)


def test_rotation_rewraps_keys_and_leaves_files_and_pseudonyms_as_they_are(store):
    pseudonym = Pseudonyms(load_pseudonym_key(store.uri)).of("client", "x")
    (path,) = write_calls(store, [_call()])
    before = (pathlib.Path(store.uri) / path).read_bytes()
    assert store.key_versions() == {1}
    assert store.content_keys.kms.rotate() == 2
    assert store.rewrap_keys() == 1
    assert store.key_versions() == {2}
    assert (pathlib.Path(store.uri) / path).read_bytes() == before
    store.content_keys.kms.retire(before=2)
    assert set(json.loads(_key_file(store).read_text())["content_keys"]) == {"2"}
    assert read_calls(Store(store.uri)) == [_call()]
    assert Pseudonyms(load_pseudonym_key(store.uri)).of("client", "x") == pseudonym


def test_what_a_retired_key_wrapped_is_told_from_a_wrong_key(store):
    write_calls(store, [_call()])
    store.content_keys.kms.rotate()
    store.content_keys.kms.retire(before=2)
    with pytest.raises(KeyAccessError, match="no version 1"):
        read_calls(Store(store.uri))


def test_another_process_may_rotate(tmp_path):
    one, other = FileKms(tmp_path / "content.keys"), FileKms(tmp_path / "content.keys")
    wrapped = one.wrap(b"k" * 32)
    other.rotate()
    assert version_of(one.wrap(b"k" * 32)) == 2
    assert other.unwrap(wrapped) == one.unwrap(wrapped) == b"k" * 32


def test_an_encrypted_file_is_never_overwritten(store):
    table = pa.table({"said": [SECRET]})
    store.write_table("x/a.parquet", table, encrypted=("said",))
    with pytest.raises(AssertionError, match="never written again"):
        store.write_table("x/a.parquet", table, encrypted=("said",))
    assert store.read_table("x/a.parquet")["said"].to_pylist() == [SECRET]


def test_a_writer_that_fails_leaves_nothing(store):
    schema = pa.schema([pa.field("said", pa.string())])
    with pytest.raises(ZeroDivisionError), store.table_writer("x/a.parquet", schema, ("said",)) as writer:
        writer.write_table(pa.table({"said": [SECRET]}))
        raise ZeroDivisionError
    assert not [path for path in pathlib.Path(store.uri).rglob("*") if path.is_file()]


def test_a_deleted_file_takes_its_keys_with_it(store):
    (path,) = write_calls(store, [_call()])
    store.delete(path)
    store.delete(path)
    assert not [file for file in pathlib.Path(store.uri).rglob("*") if file.is_file()]


def test_keys_travel_to_workers_without_a_secret(store):
    write_calls(store, [_call()])
    pickled = pickle.dumps(store.content_keys)
    (secret,) = json.loads(_key_file(store).read_text())["content_keys"].values()
    assert secret.encode() not in pickled and bytes.fromhex(secret) not in pickled
    key, wrapped = store.content_keys.new_data_key()
    assert pickle.loads(pickled).unwrap(wrapped) == key


def test_a_vault_wraps_unwraps_and_rotates(store, vault):
    (path,) = write_calls(store, [_call()])
    assert read_calls(Store(store.uri)) == [_call()]
    assert not _key_file(store).exists()
    assert store.content_keys.kms.rotate() == 2
    assert (store.rewrap_keys(), store.key_versions()) == (1, {2})
    store.content_keys.kms.retire(before=2)
    assert read_calls(Store(store.uri)) == [_call()]
    # What rests beside the files knows neither the server nor the token.
    beside = next(pathlib.Path(store.uri).rglob("_KEY_MATERIAL*")).read_text()
    assert "t0p" not in beside and vault.address not in beside


def test_a_writer_that_may_not_decrypt_still_captures(store, vault):
    vault.allowed = {"encrypt"}
    write_calls(store, [_call()])
    with pytest.raises(KeyAccessError, match="refused to decrypt.*HTTP 403"):
        read_calls(Store(store.uri))


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_vault_without_the_right_token_says_so(store, vault, monkeypatch, token):
    monkeypatch.setenv("VAULT_TOKEN", token)
    with pytest.raises(KeyAccessError, match="VAULT_TOKEN|HTTP 403"):
        write_calls(store, [_call()])


def test_a_vault_that_is_away_says_so(monkeypatch):
    monkeypatch.setenv("VAULT_TOKEN", "t")
    kms = VaultKms(KmsConfig(kind="vault", place="http://127.0.0.1:9", key_name="k"))
    with pytest.raises(KeyAccessError, match="gave no answer to encrypt"):
        kms.wrap(b"k" * 32)


def test_a_vault_that_redirects_is_not_followed(vault):
    vault.redirect_to = "http://127.0.0.1:9/"
    with pytest.raises(KeyAccessError, match="HTTP 307"):
        VaultKms(find_kms("s3://b", None)).wrap(b"k" * 32)


@pytest.mark.parametrize("value", ["", "file:relative", "vault:", "vault:a/b", "aws:key", "file"])
def test_a_kms_that_is_none_is_refused(monkeypatch, tmp_path, value):
    monkeypatch.setenv(KMS_ENV, value)
    with pytest.raises(ConfigError, match="allowed in UNDERSTUDY_KMS"):
        find_kms("s", tmp_path)


@pytest.mark.parametrize("address", ["", "vault.example", "http://vault.example:8200", "ftp://127.0.0.1"])
def test_keys_never_travel_in_the_clear(monkeypatch, tmp_path, address):
    monkeypatch.setenv(KMS_ENV, "vault:k")
    monkeypatch.setenv("VAULT_ADDR", address)
    with pytest.raises(ConfigError, match="VAULT_ADDR"):
        find_kms("s", tmp_path)


def test_a_remote_store_must_name_its_kms(monkeypatch):
    monkeypatch.delenv(KMS_ENV, raising=False)
    with pytest.raises(ConfigError, match="only encrypted"):
        find_kms("s3://bucket/prefix", None)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"content_keys": {}}', b'{"content_keys": {"1": "00"}}', b"[1]"])
def test_a_damaged_key_file_is_never_replaced(tmp_path, content):
    path = tmp_path / "content.keys"
    path.write_bytes(content)
    path.chmod(0o600)
    for act in (lambda kms: kms.wrap(b"k" * 32), lambda kms: kms.rotate()):
        with pytest.raises(ConfigError, match="restore it"):
            act(FileKms(path))
    assert path.read_bytes() == content


def test_content_keys_are_equal_by_their_config(tmp_path):
    config = KmsConfig(kind="file", place=str(tmp_path / "k"))
    _, wrapped = ContentKeys(config).new_data_key()
    assert len(ContentKeys(config).unwrap(wrapped)) == 32
