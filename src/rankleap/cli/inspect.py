"""``rankleap inspect``: what a directory of checkpoints holds."""

from collections import Counter

from rankleap.cli.show import Json, RunLocation, TrustPickle, show_json, show_table, size


def inspect(directory: RunLocation, trust_pickle: TrustPickle = False, as_json: Json = False) -> None:
    """Show what is here: layout, steps, base, adapter, tensors, size, precision, and what was skipped and why."""
    from rankleap.checkpoints import AdapterCheckpoint, open_run

    run = open_run(directory, trust_pickle)
    # One stands for all: checkpoints of mixed layouts are refused when the run is opened.
    last = run.checkpoints[run.steps[-1]]
    facts: dict[str, object] = {
        "run": str(run.directory),
        "layout": run.layout.name,
        "base": run.base_name(),
        "adapter": last.settings if isinstance(last, AdapterCheckpoint) else None,
        "steps": run.steps,
        "tensors": len(last.shapes),
        "dtypes": dict(Counter(last.source.dtypes.values())),
        "size_bytes": sum(checkpoint.size_bytes() for checkpoint in run.checkpoints.values()),
        "skipped": run.skipped,
    }
    if as_json:
        show_json(facts)
        return
    rows = {
        **facts,
        "base": facts["base"] or "not named by the run; give it with --base",
        "adapter": _listed(last.settings) if isinstance(last, AdapterCheckpoint) else "none: full weights",
        "steps": f"{len(run.steps)}: {_short(run.steps)}",
        "dtypes": ", ".join(f"{dtype} × {count}" for dtype, count in Counter(last.source.dtypes.values()).items()),
        "size_bytes": size(sum(checkpoint.size_bytes() for checkpoint in run.checkpoints.values())),
        "skipped": "\n".join(f"{name}: {why}" for name, why in run.skipped.items()) or "none",
    }
    show_table("what is here", [{"": key.removesuffix("_bytes"), "value": value} for key, value in rows.items()])


def _listed(settings: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def _short(steps: list[int]) -> str:
    """The steps, or the first and last few of many."""
    few = steps if len(steps) <= 12 else [*steps[:6], "…", *steps[-5:]]
    return ", ".join(map(str, few))
