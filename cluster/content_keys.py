"""The keys that content rests under: Parquet columns by modular encryption, other bytes by a data key of their own.

Each file has random data keys; a key-encryption key wraps them, and the KMS wraps that one (double wrapping). What is
wrapped lies beside the file (`_KEY_MATERIAL_FOR_NAME.json`), so that a new master key rewraps it and leaves the file
as it is. Footers stay plain and signed: who has no key counts and prices, and reads nothing of what was said. Pickles
by its KmsConfig; the factory, which does not pickle, is built in each process. Sources: Apache Parquet Modular
Encryption; pyarrow.parquet.encryption; NIST SP 800-38D.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Sequence

import pyarrow.fs as pafs
import pyarrow.parquet.encryption as pe

from cluster.kms import Kms, KmsConfig, open_kms

MASTER_KEY = "content"
"""What Parquet's key material calls the master key; the version stands in the wrapped key."""
CACHE_LIFETIME_S = 600
"""Longest time a process goes on with a key-encryption key: a new master key reaches every writer within it."""


class ContentKeys:
    """Encrypts and decrypts for one store. Safe to use from several threads."""

    def __init__(self, config: KmsConfig) -> None:
        self.config = config
        self._kms: Kms = open_kms(config)
        self._factory = pe.CryptoFactory(lambda _: _Client(self._kms))

    def __reduce__(self) -> tuple[type[ContentKeys], tuple[KmsConfig]]:
        return ContentKeys, (self.config,)

    @property
    def kms(self) -> Kms:
        """The client, for rotation."""
        return self._kms

    def new_data_key(self) -> tuple[bytes, str]:
        """32 fresh random bytes for AES-256-GCM, and the same wrapped by the KMS, to be kept beside what they encrypt.

        Raises:
            KeyAccessError: the KMS gives no key to this process.
        """
        key = secrets.token_bytes(32)
        return key, self._kms.wrap(key)

    def unwrap(self, wrapped: str) -> bytes:
        """The data key that `new_data_key` gave.

        Raises:
            KeyAccessError: the KMS gives no key to this process, or the text is none of its own.
        """
        return self._kms.unwrap(wrapped)

    def encryption(self, columns: Sequence[str], path: str, filesystem: pafs.FileSystem) -> pe.FileEncryptionProperties:
        """What a Parquet writer needs to encrypt `columns`; writes the key material for `path` beside it at once.

        Raises:
            KeyAccessError: the KMS gives no key to this process.
        """
        config = pe.EncryptionConfiguration(
            footer_key=MASTER_KEY,
            column_keys={MASTER_KEY: list(columns)},
            plaintext_footer=True,
            internal_key_material=False,
            double_wrapping=True,
            data_key_length_bits=256,
            cache_lifetime=datetime.timedelta(seconds=CACHE_LIFETIME_S),
        )
        return self._factory.file_encryption_properties(_CONNECTION, config, path, filesystem)

    def decryption(self, path: str, filesystem: pafs.FileSystem) -> pe.FileDecryptionProperties:
        """What a Parquet reader needs. The KMS is asked when it reads, and a KeyAccessError comes up there."""
        config = pe.DecryptionConfiguration(cache_lifetime=datetime.timedelta(seconds=CACHE_LIFETIME_S))
        return self._factory.file_decryption_properties(_CONNECTION, config, path, filesystem)

    def rewrap(self, path: str, filesystem: pafs.FileSystem) -> None:
        """Wrap the keys of one Parquet file with the newest master key; the file itself is not touched."""
        # Cached keys are wrapped with an older master key.
        self._factory.remove_cache_entries_for_all_tokens()
        self._factory.rotate_master_keys(_CONNECTION, path, filesystem, True, CACHE_LIFETIME_S)


_CONNECTION = pe.KmsConnectionConfig()
"""Empty: the client knows its server, and what stands in here would be written beside every file."""


class _Client(pe.KmsClient):
    """Hands Arrow's requests on to the KMS; its errors come through Arrow as they are."""

    def __init__(self, kms: Kms) -> None:
        super().__init__()
        self._kms = kms

    def wrap_key(self, key_bytes: bytes, _: str) -> str:
        return self._kms.wrap(key_bytes)

    def unwrap_key(self, wrapped_key: str, _: str) -> bytes:
        return self._kms.unwrap(wrapped_key)
