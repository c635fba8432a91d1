"""The exception tree. Every error pickles, because Ray carries them between processes.

UnderstudyError
|-- ConfigError (ValueError)        a recipe or override is wrong; exit code 2
|   `-- BaseUnavailableError        a base model that cannot be fetched from a hub or read from a folder
|-- InputError (ValueError)         a file or record given by the user cannot be used
|-- StoreError (OSError)            an artifact is missing, half-written or altered
|   `-- KeyAccessError              content is encrypted and its key is not to be had
|-- UpstreamError (RuntimeError)    the LLM behind `upstream.base_url` did not answer
|-- TrainingError (RuntimeError)    a fine-tune failed; the other tasks go on
|   `-- RunYielded                    a fine-tune stopped at a checkpoint because it was asked to; it can go on from there
|-- EngineError (RuntimeError)      the serving engine refused or failed a generation
`-- ReleaseError (RuntimeError)     a release cannot be promoted or served

A user's error names the field, the value, what is allowed and the next command.
"""


class UnderstudyError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(UnderstudyError, ValueError):
    """Configuration that cannot work; raised before any Ray call."""


class BaseUnavailableError(ConfigError):
    """A base model that is named properly and yet cannot be fetched or read."""


class InputError(UnderstudyError, ValueError):
    """A file, folder or record given by the user that cannot be used."""


class StoreError(UnderstudyError, OSError):
    """An artifact that is missing, unfinished or does not match its manifest."""


class KeyAccessError(StoreError):
    """Content whose key is absent, refused or another one."""


class UpstreamError(UnderstudyError, RuntimeError):
    """The LLM gave no usable answer. `status` is the HTTP status to show the client, `retry_after_s` how long it should wait
    before it tries again, where that is known."""

    def __init__(
        self, message: str, status: int = 502, body: dict | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, status, body, retry_after_s)
        self.message, self.status, self.body, self.retry_after_s = message, status, body, retry_after_s

    def __str__(self) -> str:
        return self.message


class TrainingError(UnderstudyError, RuntimeError):
    """A fine-tune that failed after its retries."""


class RunYielded(TrainingError):
    """A fine-tune that stopped at a checkpoint because serving needs its place."""


class EngineError(UnderstudyError, RuntimeError):
    """The engine that serves specialists refused or failed a generation."""


class ReleaseError(UnderstudyError, RuntimeError):
    """A release that cannot be promoted, rolled back to or served."""
