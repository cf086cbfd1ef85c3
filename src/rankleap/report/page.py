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


# Vega turns its expressions into functions, which the policy calls eval; pictures replace charts without scripts.
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src file:">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>Report: $title</h1>
$body
</main>
<script type="application/json" id="charts">$charts</script>
<script type="module">$script</script>
</body>
</html>
""")

_STYLE = """
:root { --paper: #ffffff; --ink: #24292f; --soft: #57606a; --line: #d9dde2; --link: #0062a3; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #dfe3e8; --soft: #9aa4ae; --line: #3a4048; --link: #6cb8f0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .6rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
figure { margin: 1.5rem 0; }
figcaption, .files { color: var(--soft); font-size: .875rem; max-width: 46rem; }
.files { margin: .25rem 0 0; }
.files a { margin-right: .75rem; }
.panels { display: grid; gap: 1.25rem 2rem; }
.of-2 { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.of-3 { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.chart { width: 100%; min-width: 0; }
.scroll { overflow-x: auto; margin-top: 1.5rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; max-width: calc(100vw - 2.5rem); font-weight: 600; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
@media (min-width: 50rem) { tbody th { white-space: nowrap; } }
td { white-space: nowrap; }
td:last-child:not(.number) { white-space: normal; min-width: 16rem; }
.number { text-align: right; }
details { margin-top: 1.5rem; }
summary { cursor: pointer; font-weight: 600; font-size: .9rem; }
"""

_SCRIPT = """
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
let drawn = [];
async function draw() {
  drawn.splice(0).forEach(chart => chart.finalize());
  const theme = dark.matches ? "dark" : "light";
  const options = {actions: false, renderer: "svg", config: charts.themes[theme], tooltip: {theme: theme}};
  for (const [id, spec] of Object.entries(charts.specs)) {
    drawn.push(await vegaEmbed(document.getElementById(id), spec, options));
  }
}
dark.addEventListener("change", draw);
draw();
"""


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the page; figures and tables are linked as files beside it."""
    figures = [figure for section in sections for figure in section.figures]
    specs = {f"{figure.name}-{number}": spec for figure in figures for number, spec in enumerate(figure.specs())}
    return _PAGE.substitute(
        title=escape(title),
        style=_STYLE,
        body="\n".join(_section(section) for section in sections),
        # A "</script>" inside a value would end the block; \u003c is the same character to JSON.
        charts=json.dumps({"themes": THEMES, "specs": specs}, allow_nan=False).replace("<", "\\u003c"),
        script=_script(),
    )


@cache
def _script() -> str:
    """Bundle the page's own lines with Vega, Vega-Lite (as the definitions ask, such as v6.4.1) and Vega-Embed."""
    major, minor, *_ = alt.SCHEMA_VERSION.removeprefix("v").split(".")
    bundle = vl_convert.javascript_bundle(_SCRIPT, vl_version=f"{major}.{minor}")
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
