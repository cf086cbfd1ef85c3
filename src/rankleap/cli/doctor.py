"""``rankleap doctor``: what is installed, and what will work here."""

from importlib.util import find_spec

from rankleap.cli.show import Json, show_json, show_table

_NEEDS = {
    "trajectory, leap, inspect": ["torch", "transformers", "safetensors", "scipy"],
    "train, demo, evaluate": ["trl", "peft", "accelerate", "datasets", "reasoning_gym"],
    "report": ["altair", "vl_convert"],
    "cluster": ["ray"],
    "vllm": ["vllm"],
}


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, bundled bases, and which verbs will work here."""
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
