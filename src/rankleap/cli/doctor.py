"""``rankleap doctor``: what is installed, and what will work here."""

from importlib.util import find_spec
from typing import Annotated

import typer

from rankleap.cli.show import Json, extras, show_json, show_table

Adapters = Annotated[bool, typer.Option("--adapters", help="Show the adapters and what does not go with them.")]

_NEEDS = {
    "trajectory, leap, inspect": ["torch", "transformers", "safetensors", "scipy"],
    "train, demo, evaluate": ["trl", "peft", "accelerate", "datasets", "reasoning_gym"],
    "report": ["altair", "vl_convert"],
    "cluster": ["ray"],
    "vllm": ["vllm"],
}


def doctor(as_json: Json = False, adapters: Adapters = False) -> None:
    """Show versions, devices, bundled bases, and which verbs will work here."""
    if adapters:
        _show_adapters(as_json)
        return
    import torch

    from rankleap.checkpoints import bundled_bases
    from rankleap.files import machine, versions
    from rankleap.predictors import PREDICTORS
    from rankleap.tasks import TASKS

    # Looked up, not imported: some of these take seconds to load.
    missing = {verbs: [name for name in names if find_spec(name) is None] for verbs, names in _NEEDS.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    lists = {"bundled bases": bundled_bases(), "tasks": sorted(TASKS), "predictors": list(PREDICTORS)}
    facts: dict[str, object] = {
        "versions": versions(),
        "machine": machine(),
        "device": device,
        "works": {verbs: not absent for verbs, absent in missing.items()},
        "missing": {verbs: absent for verbs, absent in missing.items() if absent},
        **{key.replace(" ", "_"): names for key, names in lists.items()},
    }
    if as_json:
        show_json(facts)
        return
    rows = [{"": name, "value": version} for name, version in {**versions(), **machine(), "device": device}.items()]
    rows += [
        {"": verbs, "value": f"needs {', '.join(absent)}" if absent else "works"} for verbs, absent in missing.items()
    ]
    rows += [{"": key, "value": ", ".join(names)} for key, names in lists.items()]
    show_table("rankleap doctor", rows)


def _show_adapters(as_json: bool) -> None:
    with extras("doctor --adapters"):
        from rankleap.adapters import ADAPTERS, RULES
    rows = [
        {
            "method": row.name,
            "PEFT": row.peft_class.__name__ if row.peft_class else "",
            "targets": {"linear": "linear layers", "norm": "norms"}[row.targets] if row.peft_class else "all weights",
            "trains": ", ".join(sorted(row.parts)) or "all weights",
            "learning rate": f"{row.rates[1]:g} ({row.rates[0]:g} to {row.rates[2]:g})",
            "trajectories": "yes" if row.readable else "cannot be read",
        }
        for row in ADAPTERS.values()
    ]
    rules = [{"": rule.action, "when": rule.when, "why": rule.why, "instead": rule.instead} for rule in RULES]
    if as_json:
        show_json({"adapters": rows, "rules": rules})
        return
    show_table("adapters", rows, note="learning rates for models of 1 to 8 billion weights: where a sweep begins")
    show_table("what does not go together", rules)
