"""``rankleap inspect``: what a directory of checkpoints holds."""

from collections import Counter

from rankleap.cli.show import Json, RunLocation, TrustPickle, short_list, show_json, show_table, size


def inspect(directory: RunLocation, trust_pickle: TrustPickle = False, as_json: Json = False) -> None:
    """Show what is here: layout, steps, base, adapter, tensors, size, precision, and what was skipped and why."""
    from rankleap.checkpoints import AdapterCheckpoint, open_run

    run = open_run(directory, trust_pickle)
    # One stands for all: checkpoints of mixed layouts are refused when the run is opened.
    last = run.checkpoints[run.steps[-1]]
    dtypes = Counter(last.source.dtypes.values())
    size_bytes = sum(checkpoint.size_bytes() for checkpoint in run.checkpoints.values())
    facts: dict[str, object] = {
        "run": str(run.directory),
        "layout": run.layout.name,
        "base": run.base_name(),
        "adapter": last.settings if isinstance(last, AdapterCheckpoint) else None,
        "steps": run.steps,
        "tensors": len(last.shapes),
        "dtypes": dict(dtypes),
        "size_bytes": size_bytes,
        "skipped": run.skipped,
    }
    if as_json:
        show_json(facts)
        return
    rows = {
        **facts,
        "base": facts["base"] or "not named by the run; give it with --base",
        "adapter": _listed(last.settings) if isinstance(last, AdapterCheckpoint) else "none: full weights",
        "steps": f"{len(run.steps)}: {short_list(run.steps)}",
        "dtypes": ", ".join(f"{dtype} × {count}" for dtype, count in dtypes.items()),
        "size_bytes": size(size_bytes),
        "skipped": "\n".join(f"{name}: {why}" for name, why in run.skipped.items()) or "none",
    }
    show_table("what is here", [{"": key.removesuffix("_bytes"), "value": value} for key, value in rows.items()])


def _listed(settings: dict[str, object]) -> str:
    """``LoRA, rank 16, alpha 32, on k_proj, q_proj``."""
    targets = settings.get("target_modules")
    where = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
    numbers = [f"{key} {settings[key]:g}" for key in ("rank", "alpha") if key in settings]
    return ", ".join([str(settings["method"]), *numbers, f"on {where}"])
