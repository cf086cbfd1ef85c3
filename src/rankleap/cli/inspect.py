"""``rankleap inspect``: what a directory of checkpoints holds."""

from collections import Counter

from rankleap.cli.options import Json, RunDirectory
from rankleap.cli.show import show_json, show_table, size


def inspect(directory: RunDirectory, as_json: Json = False) -> None:
    """Show what is here: layout, steps, base, adapter, size, and what was skipped and why."""
    from rankleap.checkpoints import AdapterCheckpoint, open_run

    run = open_run(directory)
    # One stands for all: checkpoints of mixed layouts are refused when the run is opened.
    last = run.checkpoints[run.steps[-1]]
    facts: dict[str, object] = {
        "run": str(run.directory),
        "layout": run.layout.name,
        "base": run.base_name(),
        "steps": run.steps,
        "tensors": len(last.shapes),
        "size_bytes": sum(checkpoint.size_bytes() for checkpoint in run.checkpoints.values()),
        "skipped": run.skipped,
    }
    if isinstance(last, AdapterCheckpoint):
        facts["adapter"] = {
            key: last.config.get(key) for key in ("r", "lora_alpha", "use_dora", "use_rslora", "target_modules")
        }
    else:
        facts["dtypes"] = dict(Counter(last.dtypes.values()))
    if as_json:
        show_json(facts)
        return
    facts["size_bytes"] = size(sum(checkpoint.size_bytes() for checkpoint in run.checkpoints.values()))
    facts["base"] = facts["base"] or "not named by the run; give it with --base"
    facts["skipped"] = "\n".join(f"{name}: {why}" for name, why in run.skipped.items()) or "none"
    show_table("what is here", [{"": key.removesuffix("_bytes"), "value": value} for key, value in facts.items()])
