"""One HTML page that needs nothing else, and what stands in it: sentences, then figures, then tables, for what there is.

Vega's JavaScript stands in it once, every chart's definition beside it. The content security policy lets the
browser load nothing from anywhere. All text from files is escaped.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from html import escape
from itertools import count
from pathlib import Path
from string import Template

import altair as alt
import vl_convert

from rankleap.report.figures import THEMES, Figure, accuracy_figure, evidence_figures, reward_figure
from rankleap.report.read import Group, Run, Study
from rankleap.report.sentences import evidence_sentence, statistics, study_sentences
from rankleap.report.tables import Table, evidence_table, run_tables, study_tables


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A heading, paragraphs, figures and tables, shown in this order."""

    heading: str
    paragraphs: tuple[str, ...]
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]


def title(groups: Sequence[Group]) -> str:
    """Name the studies, or else the runs."""
    studies = [group.study.name for group in groups if group.study]
    return ", ".join(studies or [run.name for group in groups for run in group.runs])


def sections(groups: Iterable[Group]) -> list[Section]:
    """Everything that the groups have to show, every figure and table under a file name of its own."""
    taken: set[str] = set()
    return [
        replace(
            section,
            figures=tuple(replace(figure, name=_unused(figure.name, taken)) for figure in section.figures),
            tables=tuple(replace(table, name=_unused(table.name, taken)) for table in section.tables),
        )
        for group in groups
        for section in _of_group(group)
    ]


def _of_group(group: Group) -> Iterator[Section]:
    if group.study:
        yield _study(group.study)
    if group.runs or group.missing:
        yield _runs(group)
    for run in _evidence_runs(group):
        numbers = statistics(run.evidence)
        if numbers:
            sentence = evidence_sentence(run.name, numbers)
            table = evidence_table(run.name, numbers)
            figures, tables = evidence_figures(numbers), (table,) if table.rows else ()
            yield Section(
                f"What training did to the weights: {run.name}", (sentence,) if sentence else (), figures, tables
            )


def _study(study: Study) -> Section:
    heading = f"{study.name}: accuracy on {study.task}" if study.task else study.name
    made_with = ", ".join(f"{name} {value}" for name, value in {**study.machine, **study.versions}.items())
    footnote = (f"Made with {made_with}.",) if made_with else ()
    figures = (accuracy_figure(study),) if any(arm.curve for arm in study.arms) else ()
    return Section(heading, (*study_sentences(study), *footnote), figures, tuple(study_tables(study)))


def _runs(group: Group) -> Section:
    # A run of another trainer has no metrics.jsonl, and then there is no reward to draw.
    rewarded = any(row.reward is not None for run in group.runs for row in run.metrics)
    absent = (f"Listed by the study but not found: {', '.join(group.missing)}.",) if group.missing else ()
    return Section("Runs", absent, (reward_figure(group.runs),) if rewarded else (), tuple(run_tables(group.runs)))


def _evidence_runs(group: Group) -> list[Run]:
    """Of a study its first plain run, for a leap breaks the path; of runs that were given, all."""
    having = [run for run in group.runs if run.evidence]
    # The sort is stable and False comes first: this is the first run that made no decision.
    return sorted(having, key=lambda run: bool(run.decisions))[:1] if group.study else having


def _unused(name: str, taken: set[str]) -> str:
    """The name, or the name with the first number that makes it one of its own: ``arms``, ``arms-2``, …"""
    free = next(one for number in count(1) if (one := name if number == 1 else f"{name}-{number}") not in taken)
    taken.add(free)
    return free


# Vega turns its expressions into functions, which the page's policy calls eval; pictures replace charts without scripts.
_PAGE = Path(__file__).with_name("page.html")


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the page; figures and tables are linked as files beside it."""
    figures = [figure for section in sections for figure in section.figures]
    specs = {f"{figure.name}-{number}": spec for figure in figures for number, spec in enumerate(figure.specs())}
    return Template(_PAGE.read_text()).substitute(
        title=escape(title),
        body="\n".join(_section(section) for section in sections),
        # A "</script>" inside a value would end the block; \u003c is the same character to JSON.
        charts=json.dumps({"themes": THEMES, "specs": specs}, allow_nan=False).replace("<", "\\u003c"),
        script=_script(),
    )


@cache
def _script() -> str:
    """Bundle the page's own lines with Vega, Vega-Lite (as the definitions ask, such as v6.4.1) and Vega-Embed."""
    major, minor, *_ = alt.SCHEMA_VERSION.removeprefix("v").split(".")
    bundle = vl_convert.javascript_bundle(_PAGE.with_suffix(".js").read_text(), vl_version=f"{major}.{minor}")
    # Inside a JavaScript string <\/ means </, but only the first of them leaves the element open.
    return bundle.replace("</script", "<\\/script")


def _section(section: Section) -> str:
    paragraphs = [f"<p>{_text(paragraph)}</p>" for paragraph in section.paragraphs]
    figures = [_figure(figure) for figure in section.figures]
    tables = [table.html() for table in section.tables]
    return "\n".join(["<section>", f"<h2>{escape(section.heading)}</h2>", *paragraphs, *figures, *tables, "</section>"])


def _figure(figure: Figure) -> str:
    boxes = "".join(f'<div class="chart" id="{figure.name}-{number}"></div>' for number in range(len(figure.panels)))
    picture = f'<noscript><img src="figures/{figure.name}.svg" alt="{escape(figure.caption)}"></noscript>'
    links = " ".join(f'<a href="figures/{figure.name}.{kind}">{kind.upper()}</a>' for kind in ("svg", "png"))
    caption = f'<figcaption>{_text(figure.caption)}<p class="files">{links}</p></figcaption>'
    return f'<figure><div class="panels of-{figure.columns}">{boxes}</div>{picture}{caption}</figure>'


def _text(plain: str) -> str:
    """Escaped, with a percent sign kept on the line of its number."""
    # After escaping, or the ampersand of the entity would be escaped as well.
    return escape(plain).replace(" %", "&nbsp;%")
