"""What stands in a report and in which order: sentences, then figures, then tables, for what there is."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

from rankleap.report.evidence import statistics
from rankleap.report.figures import Figure, accuracy_figure, evidence_figures, reward_figure
from rankleap.report.read import Group, Run, Study
from rankleap.report.sentences import evidence_sentence, study_sentences
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
