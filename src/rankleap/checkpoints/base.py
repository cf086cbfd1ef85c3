"""Finds a base model: bundled with the package, a directory, or a repository on the Hub."""

from importlib import resources
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from rankleap.errors import BaseMismatchError, CheckpointError, UnknownNameError
from rankleap.files import read_json

BUNDLED = "bundled:"


def bundled_bases() -> list[str]:
    """Names of the bases that come with the package."""
    return sorted(entry.name for entry in _bases().iterdir() if entry.is_dir() and (entry / "config.json").exists())


def resolve_base(name: str) -> Path:
    """Directory of ``bundled:NAME``, of a local model, or of a Hub repository (downloaded on first use).

    Raises ``UnknownNameError`` or ``CheckpointError``.
    """
    if name.startswith(BUNDLED):
        short = name.removeprefix(BUNDLED)
        if short not in bundled_bases():
            raise UnknownNameError("bundled base", short, bundled_bases())
        return _bases() / short
    directory = Path(name)
    # A directory wins over a Hub name that reads the same.
    if directory.exists():
        return directory
    try:
        # Nothing but what is read: a repository may hold the same weights for other frameworks too.
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"base {name!r} is no directory and could not be fetched from the Hub ({type(error).__name__}); "
            f"give a directory, a Hub name, or one of: {', '.join(BUNDLED + base for base in bundled_bases())}"
        ) from None


def require_same_tokens(checkpoint: Path, base: Path) -> None:
    """Raise ``BaseMismatchError`` if both have a tokenizer and a token of the base has another id in the checkpoint.

    Tokens that were added are fine: an embedding that grew for them shows by its shape.
    """
    files = [directory / "tokenizer.json" for directory in (checkpoint, base)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = (_token_ids(file) for file in files)
    if moved := [token for token, number in theirs.items() if ours.get(token) != number]:
        raise BaseMismatchError(
            f"{checkpoint} has another tokenizer than the base {base}: {len(moved)} of {len(theirs)} tokens differ, such as "
            f"{moved[0]!r} ({theirs[moved[0]]} in the base, {ours.get(moved[0], 'absent')} here); name the right base with --base"
        )


def _token_ids(file: Path) -> dict[str, int]:
    vocabulary = read_json(file).get("model", {}).get("vocab", {})
    # A unigram model lists pairs of token and score, in the order of their ids.
    return vocabulary if isinstance(vocabulary, dict) else {pair[0]: number for number, pair in enumerate(vocabulary)}


def _bases() -> Path:
    return Path(str(resources.files("rankleap"))) / "bases"
