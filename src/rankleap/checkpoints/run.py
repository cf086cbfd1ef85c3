"""Opens a directory of checkpoints: finds the steps, tells the layout of each, skips what is incomplete and says why.

A run is a directory that holds step directories (``checkpoint-20``, ``global_step_20``, ``step_20``, ``iter_0000020``,
``epoch_1``, ``0020``), itself or in a folder that trainers put them in; or it is one checkpoint itself. TRL's ``ref/``
sub-adapter, ``tmp_`` directories and half-written files are no checkpoints.

A base model is bundled with the package, a directory, or a repository on the Hub.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

from rankleap.checkpoints.adapter import AdapterCheckpoint
from rankleap.checkpoints.full import FullCheckpoint
from rankleap.checkpoints.layouts import LAYOUTS, Checkpoint, Layout, layout_of
from rankleap.checkpoints.remote import RemotePath, open_remote
from rankleap.errors import BaseMismatchError, CheckpointError, InputError, UnknownNameError
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


_STEP = re.compile(r"(?:(?:checkpoint[-_]|global_step_?|step[-_]?|iter_|epoch_)(\d+)(?:_hf)?|(\d+))")
_TAIL = re.compile(r".+[-_]step[-_]?(\d+)")
_UNFINISHED = re.compile(r"(?:tmp[-_.]|\.).*\d|.*\d\.(?:tmp|incomplete)")
PARENTS = ("checkpoints", "checkpoint", "broadcasts", "weights", "_actor", ".")
"""Where step directories lie: rankleap, accelerate and prime-rl, torchtitan, prime-rl, OpenRLHF, everyone else."""
_LATEST = ("latest_checkpointed_iteration.txt", "latest_ckpt_global_step.txt", "latest")
STABLE = "STABLE"
"""prime-rl's empty file in a directory that is complete."""
STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Run:
    """The complete checkpoints of one run in the order of their steps, and what was skipped and why."""

    directory: Path
    layouts: dict[str, Layout]
    checkpoints: dict[int, Checkpoint]
    directories: dict[int, Path]
    """Step directories; a checkpoint's own directory may lie inside, such as verl's ``actor``."""
    skipped: dict[str, str]

    @property
    def layout(self) -> Layout:
        """The one layout that all of them have."""
        return next(iter(self.layouts.values()))

    @property
    def steps(self) -> list[int]:
        """Steps, increasing."""
        return list(self.checkpoints)

    def base_name(self) -> str | None:
        """The base that the run itself names, if it does."""
        config = self.directory / "config.json"
        model = read_json(config).get("model") if config.exists() else None
        if isinstance(model, dict) and "base" in model:  # else it is a model's own config, left there by a trainer
            return model["base"]
        last = self.checkpoints[self.steps[-1]]
        return last.base if isinstance(last, AdapterCheckpoint) else None


def open_checkpoint(directory: Path, trust_pickle: bool = False) -> Checkpoint:
    """Open one checkpoint directory; raises ``CheckpointError`` when it is missing, incomplete or unknown."""
    layout, place = layout_of(directory)
    return layout.open(place, trust_pickle)


def open_run(location: Path | str, trust_pickle: bool = False) -> Run:
    """Open every complete checkpoint of a run; raises ``CheckpointError`` when there is none.

    ``location`` is a directory, ``hf://ORG/REPO`` or another address that fsspec reads, of which only what is asked for is
    fetched. ``trust_pickle`` lets pickled checkpoints name any global, so that opening them may run any code.
    """
    location = str(location).removeprefix("file://")
    run = _open_remote(location) if "://" in location else _open_local(Path(location), trust_pickle)
    where, steps = run.directory, run.checkpoints
    if not steps:
        reasons = "".join(f"\n  {name}: {why}" for name, why in run.skipped.items())
        raise CheckpointError(
            f"no complete checkpoint in {where}; needed folders or tags such as checkpoint-20{reasons}"
        )
    if len(run.layouts) > 1:
        raise CheckpointError(
            f"{where} mixes {' and '.join(sorted(run.layouts))} checkpoints; keep one kind in one place"
        )
    return run


def _open_remote(location: str) -> Run:
    found, skipped = open_remote(location, step_in_name, PARENTS)
    layouts = [LAYOUTS["peft" if isinstance(one, AdapterCheckpoint) else "hf"] for one in found.values()]
    return Run(RemotePath(location), {layout.name: layout for layout in layouts}, found, {}, skipped)


def _open_local(directory: Path, trust_pickle: bool) -> Run:
    try:
        if not directory.is_dir():
            raise CheckpointError(
                f"{directory} is not a directory; give a run directory that holds checkpoint-N folders"
            )
        parent, named, skipped = _step_directories(directory)
    except PermissionError as error:
        raise CheckpointError(f"{error.filename} may not be read by this user; change its permissions") from None
    run, marks = Run(directory, {}, {}, {}, skipped), _marks(parent, named)
    # By number, then by name: of two directories of one step always the same one wins.
    for path, number in sorted(named, key=lambda item: (item[1], item[0].name)):
        try:
            step = _checked_step(path, number, run.directories, marks)
            layout, place = layout_of(path)
            # Opening reads headers only, yet a truncated file shows here and not halfway through the work.
            run.checkpoints[step] = layout.open(place, trust_pickle)
            run.layouts[layout.name], run.directories[step] = layout, path
        # Skipped and told, so that a run can be read while its newest step is being written.
        except InputError as error:
            skipped[path.name] = str(error)
        except PermissionError as error:
            skipped[path.name] = f"{error.filename} may not be read by this user; change its permissions"
    return run


def step_in_name(name: str) -> int | None:
    """The step that a directory or revision is named for: ``checkpoint-20``, ``GRPO-step-20``."""
    match = _STEP.fullmatch(name) or _TAIL.fullmatch(name)
    if match is None:
        return None
    step = int(next(group for group in match.groups() if group))
    # torchtune counts epochs from 0, and step 0 is the base.
    return step + name.startswith("epoch_")


def step_of(path: Path) -> int | None:
    """The step of a directory by its name, else by its ``trainer_state.json``."""
    step = step_in_name(path.name)
    return _saved_step(path) if step is None else step


def _own_step(path: Path) -> int:
    """The step of a checkpoint that is given itself: its own, else that of the step directory it lies in, else 0."""
    steps = (step_of(place) for place in (path.absolute(), path.absolute().parent))
    return next((step for step in steps if step is not None), 0)


def _saved_step(path: Path) -> int | None:
    return read_json(path / STATE).get("global_step") if _is_there(path / STATE) else None


def _checked_step(path: Path, step: int, found: dict[int, Path], marks: "_Marks") -> int:
    """The step, or a ``CheckpointError`` that says why this directory is not read."""
    if (saved := _saved_step(path)) not in (None, step):
        raise CheckpointError(f"its name says step {step}, its {STATE} says {saved}; rename it or leave it out")
    if step in found:
        raise CheckpointError(f"step {step} is here twice, {found[step].name} was taken")
    if marks.stable and not _is_there(path / STABLE):
        raise CheckpointError(f"still being written: others beside it have the marker {STABLE}, it has not")
    if marks.latest is not None and step > marks.latest:
        raise CheckpointError(
            f"still being written: the run's own mark says that {marks.latest} is its newest complete step"
        )
    return step


def _is_there(path: Path) -> bool:
    # What may not be read is told when it is opened, and not before.
    with suppress(PermissionError):
        return path.exists()
    return False


@dataclass(frozen=True, slots=True)
class _Marks:
    """What a trainer says of its steps: the newest complete one (verl, SkyRL, Megatron, DeepSpeed), or each (prime-rl)."""

    latest: int | None
    stable: bool


def _marks(parent: Path, named: list[tuple[Path, int]]) -> _Marks:
    texts = ((parent / name).read_text() for name in _LATEST if (parent / name).is_file())
    digits = [int(found.group()) for text in texts if (found := re.search(r"\d+", text))]
    return _Marks(digits[0] if digits else None, any(_is_there(path / STABLE) for path, _ in named))


def _step_directories(directory: Path) -> tuple[Path, list[tuple[Path, int]], dict[str, str]]:
    """The folder that holds the steps, each with its step, and what beside them is skipped already."""
    skipped: dict[str, str] = {}
    chosen: tuple[Path, list[tuple[Path, int]]] = (directory, [])
    for parent in (directory / name for name in PARENTS):
        folders = sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
        named = [(path, step) for path in folders if (step := step_of(path)) is not None]
        if named and chosen[1]:
            skipped[parent.name] = f"{len(named)} more step directories; give {parent} to read these instead"
        elif named:
            chosen = (parent, named)
            unfinished = (path for path in folders if _UNFINISHED.fullmatch(path.name) and step_of(path) is None)
            skipped |= {path.name: "still being written, by its name" for path in unfinished}
    if not chosen[1]:
        try:
            layout_of(directory)
        except CheckpointError:
            return *chosen, skipped
        # One checkpoint, given itself; a last save often has no step in its name.
        return directory.parent, [(directory, _own_step(directory))], skipped
    return *chosen, skipped


def base_of(run: Run, name: str | None) -> tuple[str, FullCheckpoint]:
    """The base of a run: the one given, else the one that it names; ``CheckpointError`` for neither or one of other tokens."""
    chosen = name or run.base_name()
    if chosen is None:
        raise CheckpointError(
            f"{run.directory} does not name its base; give it with --base (a directory, a Hub name or bundled:NAME)"
        )
    directory = resolve_base(chosen)
    if run.directories:  # a remote run's tokenizer would have to be fetched
        require_same_tokens(run.directories[run.steps[-1]], directory)
    base = FullCheckpoint(directory)
    _require_named(run, chosen, base)
    return chosen, base


def _require_named(run: Run, given: str, base: FullCheckpoint) -> None:
    """Refuse a base whose weights are not those of the one that the run names, if that one is at hand."""
    named = run.base_name()
    if named is None or named == given or not (named.startswith(BUNDLED) or Path(named).is_dir()):
        return
    other = FullCheckpoint(resolve_base(named))
    # Of other shapes, the tensors themselves say best what is wrong, when they are compared.
    if other.shapes == base.shapes and other.fingerprint() != base.fingerprint():
        raise BaseMismatchError(
            f"{run.directory} was trained from {named}, whose weights are not those of {given}; leave --base out"
        )


def effective_weights(checkpoint: Checkpoint, base: FullCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the model that a checkpoint stands for, in float32; an adapter is added to the base."""
    changed = checkpoint.shapes_on(base)
    for name in base.shapes:
        if name not in changed:
            yield name, base.weight(name)
        elif isinstance(checkpoint, AdapterCheckpoint):
            yield name, checkpoint.weight(name, base)
        else:
            yield name, checkpoint.weight(name)


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy float32 weights into a live model by name; raises ``CheckpointError`` for a name that it does not have."""
    # Tied weights are listed once, under the name that the file has as well.
    live = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            if name not in live:
                kind = type(model).__name__
                raise CheckpointError(
                    f"{name} is no parameter of the {kind} in memory, which fuses or renames it on loading"
                )
            live[name].copy_(weight)
