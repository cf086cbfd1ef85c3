"""A report on a study that is made up here: what it says, what it draws, and what it refuses."""

import csv
import json
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankleap.errors import InputError
from rankleap.files import append_jsonl, read_json, write_json
from rankleap.report import headline, write_report
from rankleap.report.figures import accuracy_figure
from rankleap.report.page import sections
from rankleap.report.read import TensorEvidence, collect, read_study
from rankleap.report.sentences import statistics

HOSTILE = "</script><script>alert('x')</script>"


def make_arm(name: str, rate: float, steps: int, start: float, end: float, kind: str, seed: int) -> dict[str, Any]:
    """An arm whose accuracy rises to ``end``; a leap arm jumps at every fourth evaluation."""
    noise = random.Random(seed)
    curve: list[dict[str, Any]] = []
    for step in range(0, steps + 1, steps // 10):
        share = min(1.0, step / steps * (1.6 if kind == "leap" else 1.0))
        accuracy = start + (end - start) * share**0.7 + noise.uniform(-0.015, 0.015)
        late_s = 4.0 * (step // (steps * 4 // 10)) if kind == "leap" else 0.0
        point = {
            "step": step,
            "wall_s": 0.2 * step + late_s,
            "weights": "average" if kind == "average" else "checkpoint",
        }
        curve.append({**point, "accuracy": accuracy, "ci_low": accuracy - 0.03, "ci_high": accuracy + 0.03})
        if kind == "leap" and step and step % (steps * 4 // 10) == 0:
            leapt = accuracy + 0.04
            here = {**point, "wall_s": point["wall_s"] + 0.1, "weights": "leap"}
            curve.append({**here, "accuracy": leapt, "ci_low": leapt - 0.03, "ci_high": leapt + 0.03})
    return {
        "name": name, "learning_rate": rate, "steps": steps, "curve": curve,
        **{key: curve[-1][key] for key in ("wall_s", "accuracy", "ci_low", "ci_high")},
        "leaps_tried": 2 if kind == "leap" else 0, "leaps_accepted": 2 if kind == "leap" else 0,
    }  # fmt: skip


def make_summary(name: str = "demo") -> dict[str, Any]:
    """Two learning rates, three arms each."""
    arms = [
        make_arm(label, rate, steps, 0.2, end, kind, seed)
        for rate, steps, end in ((3e-4, 150, 0.66), (3e-5, 200, 0.31))
        for seed, (label, kind) in enumerate([("plain", "plain"), ("plain, averaged", "average"), ("leap", "leap")])
    ]
    targets = {plain["learning_rate"]: plain["accuracy"] for plain in arms[::3]}
    for arm in arms:
        reached = next((one for one in arm["curve"] if one["accuracy"] >= targets[arm["learning_rate"]]), None)
        arm["steps_to_target"], arm["wall_to_target_s"] = (
            (reached["step"], reached["wall_s"]) if reached else (None, None)
        )
    saved = {
        key: {
            str(plain["learning_rate"]): 1 - leap[key] / plain[key]
            for plain, leap in zip(arms[::3], arms[2::3], strict=True)
        }
        for key in ("steps_to_target", "wall_to_target_s")
    }
    return {
        "name": name, "task": "sums", "arms": arms, "target_accuracy": targets,
        "steps_saved_fraction": saved["steps_to_target"], "wall_saved_fraction": saved["wall_to_target_s"],
        "steps_saved_fraction_vs_averaged": {"0.0003": 0.05, "3e-05": 0.30},
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2}, "versions": {"python": "3.11"},
        "runs": ["plain-3e-4", "leap-3e-4", "plain-3e-5", "leap-3e-5", "leap-gone"],
    }  # fmt: skip


def make_evidence(tensors: int = 28) -> dict[str, Any]:
    """Paths that look straight, and walks that look nearly as straight."""
    noise = random.Random(3)

    def around(middle: float, width: float = 0.02) -> list[float]:
        shift = noise.uniform(-0.015, 0.015)
        return [middle + shift - width, middle + shift + width]

    def nulls(share: float, r2: float, forward: float) -> dict[str, list[float]]:
        return {"share": around(share), "r2_in_sample": around(r2), "r2_forward": around(forward, 0.3)}

    return {
        "steps": [10, 20, 30, 40],
        "tensors": [
            {
                "name": f"model.layers.{i // 7}.{'qkvogud'[i % 7]}_proj.weight" if i else HOSTILE, "shape": [256, 96],
                "share": {"nuclear": 0.2 + noise.uniform(-0.1, 0.2), "frobenius": 0.5, "energy": 0.25},
                "share_null": {"nuclear": around(0.05), "frobenius": around(0.16), "energy": around(0.03)},
                "path": {"share": 0.9 + noise.uniform(-0.1, 0.08), "r2_in_sample": 0.985 + noise.uniform(-0.01, 0.01),
                         "r2_forward": noise.uniform(-1.8, 0.6)},
                "nulls": {"noise": nulls(0.15, 0.1, -0.5), "walk": nulls(0.81, 0.94, -0.4),
                          "permutation": nulls(0.9, 0.2, -1.0)},
            }
            for i in range(tensors)
        ],
    }  # fmt: skip


def make_run(directory: Path, *, rate: float, leaps: bool) -> Path:
    """A run directory with every part that a report reads."""
    noise = random.Random(str(directory.name))
    train = {"steps": 150, "learning_rate": rate}
    recipe = {
        "name": directory.name,
        "task": {"name": "sums"},
        "algorithm": {"name": "grpo"},
        "adapter": {"method": "full"},
    }
    write_json(directory / "config.json", {**recipe, "train": train})
    rows = [
        {"step": step, "wall_s": 0.2 * step, "reward": 0.2 + 0.003 * step + noise.uniform(-0.12, 0.12), "loss": 0.01}
        for step in range(1, 151)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(directory / "trajectory" / "index.json", {"steps": [10, 20, 30, 40], "rank": 4})
    estimate = {"value": 0.4, "low": 0.35, "high": 0.45}
    counts = {"problems": 400, "samples": 4, "mean_tokens": 6.5, "truncation_rate": 0.01, "verdicts": {"timeout": 3}}
    evaluation = {"avg": estimate, "pass": {"1": estimate, "4": {"value": 0.7, "low": 0.6, "high": 0.8}}, **counts}
    write_json(directory / "evaluation" / "sums" / "summary.json", {"checkpoint-150": evaluation})
    if leaps:
        for step, accepted in ((40, True), (80, False)):
            append_jsonl(
                directory / "leaps" / "decisions.jsonl",
                {"step": step, "accepted": accepted, "taken": accepted, "directory": None, "method": "window",
                 "coefficient": 1.5, "gain": {"value": 0.03 if accepted else -0.01, "low": 0.01, "high": 0.05},
                 "norm_ratio": 1.7, "reasons": [] if accepted else ["gain -0.010 ± 0.020 is not above zero"],
                 "tried": [{"method": "window", "window": 4, "coefficient": 1.5, "score": 0.4}] * 3, "wall_s": 3.5},
            )  # fmt: skip
    else:
        write_json(directory / "analysis" / "evidence.json", make_evidence())
    return directory


def make_study(directory: Path) -> Path:
    """A study with its runs, one of which is gone."""
    summary = make_summary()
    write_json(directory / "summary.json", summary)
    for name in summary["runs"][:-1]:
        make_run(directory / name, rate=3e-4 if name.endswith("3e-4") else 3e-5, leaps=name.startswith("leap"))
    return directory


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and its text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study with hostile text in it, and its report."""
    directory = make_study(tmp_path_factory.mktemp("runs") / "demo")
    summary = read_json(directory / "summary.json")
    write_json(directory / "summary.json", {**summary, "task": HOSTILE})
    reasons = {"step": 120, "accepted": False, "method": HOSTILE, "coefficient": 1.0, "reasons": [HOSTILE]}
    append_jsonl(directory / "leap-3e-4" / "leaps" / "decisions.jsonl", reasons)
    write_report([directory], directory / "report")
    return directory


@pytest.fixture(scope="module")
def page(study: Path) -> Tags:
    return Tags((study / "report" / "index.html").read_text())


def two_arms(**changes: Any) -> dict[str, Any]:
    """A study of one learning rate; ``leap__x`` and ``plain__x`` change an arm, the rest changes the summary."""
    end = {"accuracy": 0.31, "ci_low": 0.28, "ci_high": 0.34, "steps_to_target": 200.0, "wall_to_target_s": 40.0}
    plain = {"name": "plain", "learning_rate": 3e-5, "steps": 200, "wall_s": 40.0, **end}
    arrival = {"steps_to_target": 110.0, "wall_to_target_s": 28.0}
    leap = {**plain, "name": "leap", **arrival, "leaps_tried": 4, "leaps_accepted": 3}
    summary = {"name": "demo", "task": "sums", "arms": [plain, leap], "target_accuracy": {"3e-05": 0.31},
               "steps_saved_fraction": {"3e-05": 0.45}, "wall_saved_fraction": {"3e-05": 0.3},
               "steps_saved_fraction_vs_averaged": {"3e-05": 0.25}}  # fmt: skip
    for key, value in changes.items():
        arm, _, name = key.rpartition("__")
        ({"plain": plain, "leap": leap}.get(arm, summary))[name] = value
    return summary


def test_headline_says_what_was_saved_and_against_what() -> None:
    first, limits = headline(two_arms())
    assert first.startswith(
        "At a learning rate of 3e-05 the leap arm reached the plain arm's final level (0.310) after 110 steps, "
        "the plain arm after 200: 45 % of the steps saved."
    )
    assert "wall-clock time 30 % was saved (28 s instead of 40 s, choosing and gating the leaps included)." in first
    assert "averaging, to its own final level: 25 % of the steps saved." in first
    assert "accepted 3 of 4 leaps" in first
    assert "not separated by their intervals" in first
    assert "seed" in limits


def test_headline_says_plainly_that_nothing_was_saved() -> None:
    never = two_arms(leap__steps_to_target=None, leap__wall_to_target_s=None, steps_saved_fraction={"3e-05": None})
    assert "did not reach" in headline(never)[0]
    assert "nothing was saved" in headline(never)[0]
    assert "wall-clock" not in headline(never)[0]
    slower = headline(two_arms(wall_saved_fraction={"3e-05": -0.2}, leap__wall_to_target_s=48.0))[0]
    assert "No wall-clock time was saved: it took 20 % longer (48 s instead of 40 s" in slower
    assert "own final level: not reached." in headline(two_arms(steps_saved_fraction_vs_averaged={"3e-05": None}))[0]
    assert "none of 4 leaps tried" in headline(two_arms(leap__leaps_accepted=0))[0]


@given(st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0.001, 0.2))
def test_arms_are_told_apart_only_where_their_intervals_do_not_overlap(plain: float, leap: float, half: float) -> None:
    ends = {f"{arm}__{key}": value + shift for arm, value in (("plain", plain), ("leap", leap))
            for key, shift in (("accuracy", 0), ("ci_low", -half), ("ci_high", half))}  # fmt: skip
    said = headline(two_arms(**ends))[0]
    overlap = ends["leap__ci_low"] <= ends["plain__ci_high"] and ends["plain__ci_low"] <= ends["leap__ci_high"]
    assert ("not separated" in said) == overlap
    assert ("is higher with leaps" in said) == (not overlap and leap > plain)


@given(st.floats(-3, 0.0049))
def test_a_fraction_that_rounds_to_zero_or_less_is_no_saving(saved: float) -> None:
    by_rate = {"3e-05": saved}
    keys = ("steps_saved_fraction", "wall_saved_fraction", "steps_saved_fraction_vs_averaged")
    changes = dict.fromkeys(keys, by_rate)
    assert not re.search(r"\d % (of the steps|was) saved", headline(two_arms(**changes))[0])


def test_headline_without_a_leap_arm_compares_nothing() -> None:
    alone = two_arms()
    alone["arms"] = alone["arms"][:1]
    assert "0.310 [0.280, 0.340] for plain; there are no two arms to compare" in headline(alone)[0]


def test_headline_shows_that_a_better_learning_rate_gives_more_than_a_leap() -> None:
    summary = two_arms(leap__accuracy=0.4, leap__ci_low=0.36, leap__ci_high=0.44)
    better = {"learning_rate": 3e-4, "accuracy": 0.7, "ci_low": 0.65, "ci_high": 0.75}
    plain, leap = ({**arm, **better} for arm in summary["arms"])
    said = headline({**summary, "arms": [*summary["arms"], plain, {**leap, "accuracy": 0.39}]})[2]
    assert "0.700 [0.650, 0.750] for plain (learning rate 0.0003) and 0.400 [0.360, 0.440] for leap" in said


def test_headline_names_the_place_of_a_malformed_number() -> None:
    with pytest.raises(InputError, match=r"arms\.1\.steps_to_target.*'many'"):
        headline(two_arms(leap__steps_to_target="many"))


def test_page_loads_nothing_from_anywhere(study: Path, page: Tags) -> None:
    text = (study / "report" / "index.html").read_text()
    assert all((attributes.get("src") or "figures/").startswith("figures/") for _, attributes in page.tags)
    assert page.count("link") == page.count("iframe") == 0
    assert all("://" not in (attributes.get("href") or "") for _, attributes in page.tags)
    assert not re.search(r"@import|url\(", text[: text.index("<script")])
    assert "default-src 'none'" in text
    assert len(text) < 4_000_000


def test_every_link_of_the_page_is_a_file_beside_it(study: Path, page: Tags) -> None:
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    written = [path for name in ("figures", "tables") for path in (study / "report" / name).iterdir()]
    assert sorted(f"{path.parent.name}/{path.name}" for path in written) == sorted(map(str, links))
    assert {path.suffix for path in written} == {".svg", ".png", ".csv"}


def test_page_shows_charts_and_accessible_tables(study: Path, page: Tags) -> None:
    assert sum(attributes.get("class") == "chart" for _, attributes in page.tags) == 4 + 4 + 6
    assert page.count("table") == page.count("caption") == len(list((study / "report" / "tables").iterdir()))
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    assert "the plain arm's final level" in page.text
    assert "Listed by the study but not found: leap-gone." in page.text
    assert "What training did to the weights: plain-3e-4" in page.text
    assert "rejected: gain -0.010 ± 0.020 is not above zero" in page.text


def test_text_from_files_cannot_become_markup(page: Tags) -> None:
    assert page.count("script") == 2
    assert page.text.count(HOSTILE) == 3, "the task, the method and the reason are shown as they are"


def test_figures_hold_every_arm_and_a_ring_for_every_leap(study: Path) -> None:
    picture = (study / "report" / "figures" / "accuracy.svg").read_text()
    assert all(f">{name}</text>" in picture for name in ("plain", "plain, averaged", "leap"))
    rings = sum(point["weights"] == "leap" for arm in make_summary()["arms"] for point in arm["curve"])
    assert picture.count('stroke-width="1.8"') == 2 * rings > 0


def test_an_arm_looks_the_same_in_every_study() -> None:
    summary = make_summary()
    summary["arms"].reverse()
    drawn = json.dumps(accuracy_figure(read_study(summary, "summary")).specs())
    assert drawn.count('"domain": ["plain", "plain, averaged", "leap"]') == drawn.count('"domain": ["') > 0


def test_csv_holds_the_numbers_as_they_were(study: Path) -> None:
    with (study / "report" / "tables" / "arms.csv").open() as file:
        rows = list(csv.DictReader(file))
    arms = make_summary()["arms"]
    assert [float(row["accuracy"]) for row in rows] == [arm["accuracy"] for arm in arms]
    assert [row["name"] for row in rows] == [arm["name"] for arm in arms]


def test_report_replaces_a_report_and_nothing_else(study: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rate=1e-4, leaps=True)
    for _ in range(2):
        assert write_report([run], tmp_path / "report") == tmp_path / "report" / "index.html"
    before = sorted(study.rglob("*"))
    with pytest.raises(InputError, match="is not a report"):
        write_report([run], study)
    assert sorted(study.rglob("*")) == before


def test_directory_that_holds_nothing_to_show_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "model" / "config.json", {"architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(InputError, match=r"model holds none of them"):
        write_report([tmp_path / "model"], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.1}\n{"step": 2, "reward": "high"}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 .* reward: .*'high'"):
        write_report([tmp_path], tmp_path / "report")


PARTS = ("config.json", "metrics.jsonl", "trajectory", "evaluation", "leaps", "analysis")


@pytest.mark.parametrize(
    "kept",
    [*(set(PARTS) - {part} for part in PARTS), *({part} for part in PARTS)],
    ids=lambda kept: "+".join(sorted(kept)),
)
def test_every_part_of_a_run_may_be_missing(tmp_path: Path, kept: set[str]) -> None:
    run = make_run(tmp_path / "run", rate=1e-4, leaps=False)
    append_jsonl(run / "leaps" / "decisions.jsonl", {"step": 4, "accepted": False, "method": "relex", "coefficient": 1})
    for part in set(PARTS) - kept:
        (shutil.rmtree if (run / part).is_dir() else Path.unlink)(run / part)
    shown = sections(collect([run]))
    tables = {table.name for section in shown for table in section.tables}
    figures = {figure.name for section in shown for figure in section.figures}
    drawn = {"reward": "metrics.jsonl", "dominance": "analysis", "linearity": "analysis"}
    listed = {"evidence": "analysis", "leaps": "leaps", "evaluation": "evaluation"}
    assert figures == {figure for figure, part in drawn.items() if part in kept}
    assert tables == {"runs", *(table for table, part in listed.items() if part in kept)}


def test_a_run_is_shown_once_when_its_study_is_given_too(study: Path) -> None:
    groups = collect([study, study / "plain-3e-4"])
    assert [len(group.runs) for group in groups] == [4]


@given(st.lists(st.tuples(st.floats(-2, 1), st.floats(-2, 1), st.floats(0.01, 1)), min_size=1, max_size=8))
def test_a_tensor_is_above_all_nulls_only_where_it_is_above_each(rows: list[tuple[float, float, float]]) -> None:
    noise = {"share": (-3.0, -2.5)}
    evidence = [
        TensorEvidence("w", path={"share": value}, nulls={"walk": {"share": (low, low + width)}, "noise": noise})
        for value, low, width in rows
    ]
    (share,) = statistics(evidence)
    assert share.above("noise") == len(rows)
    assert share.above_all() == share.above("walk") == sum(value > low + width for value, low, width in rows)


def test_a_null_that_only_repeats_the_measured_value_is_no_null() -> None:
    nulls = {"permutation": {"share": (0.95, 0.9500001)}, "walk": {"share": (0.8, 0.9)}}
    (share,) = statistics([TensorEvidence("w", path={"share": 0.95}, nulls=nulls)])
    assert list(share.ranges) == ["walk"]
    assert share.above_all() == 1


def test_sentences_and_the_verb_load_neither_torch_nor_altair() -> None:
    code = "import sys, rankleap.report, rankleap.cli.report; print({'torch', 'altair'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
