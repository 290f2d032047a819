"""One tree of exceptions, so that callers can catch as widely as they like.

    OrthrusError
    ├── ConfigError        an option, recipe key or configuration value that cannot be honoured
    ├── PromptError        a prompt or chat that cannot be generated from
    ├── CheckpointError    files on disk that are missing, damaged or belong to another backbone
    ├── UnsupportedModel   an architecture that the dual view cannot be attached to
    ├── CacheFull          more tokens asked for than the key/value cache, or memory, has room for
    ├── DecodingError      a text that cannot go on: its logits are no numbers, its recurrent state is not known
    ├── WriteError         a file or folder that cannot be written: a full disk, no permission
    └── DataError          prompt sets, rows or shards that cannot be read or do not fit together

Every message says what is required, what was found, and what to do. The module knows nothing else.
"""


class OrthrusError(Exception):
    """Base class of every error this package raises on purpose."""


class ConfigError(OrthrusError, ValueError):
    """An option, recipe key or configuration value that cannot be honoured."""


class PromptError(OrthrusError, ValueError):
    """A prompt or chat that cannot be generated from."""


class CheckpointError(OrthrusError, ValueError):
    """Files on disk that are missing, damaged, or belong to another backbone."""


class UnsupportedModel(OrthrusError, TypeError):
    """An architecture that the dual view cannot be attached to."""


class CacheFull(OrthrusError, ValueError):
    """More tokens asked for than the key/value cache, or memory, has room for; nothing was written."""


class DecodingError(OrthrusError, RuntimeError):
    """A text that cannot go on: its logits are no numbers (other texts are unharmed), or its state is not known."""


class WriteError(OrthrusError, OSError):
    """A file or folder that cannot be written (a full disk, no permission); what was there stays."""


class DataError(OrthrusError, ValueError):
    """Prompt sets, rows or shards that cannot be read or do not fit together."""
