"""One verb per stage. Parses first and imports torch after, so that ``--help`` answers at once.

Exit codes: 0 done, 1 the run failed, 2 what was given was wrong. Errors go to stderr, results to stdout.
"""

import logging
import sys
from collections.abc import Sequence

import typer

from rankleap.cli.doctor import doctor
from rankleap.cli.evaluate import evaluate
from rankleap.cli.leap import leap
from rankleap.cli.report import demo, report
from rankleap.cli.train import train
from rankleap.cli.trajectory import inspect, trajectory, watch
from rankleap.errors import InputError, RankleapError

app = typer.Typer(
    name="rankleap",
    help="Train RLVR, read the low-rank trajectory of the weights, leap ahead along it, and say whether to trust it.",
    no_args_is_help=True,
    # An unforeseen error keeps Python's own traceback, which can be pasted into a report.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, train, inspect, trajectory, watch, leap, evaluate, report, doctor):
    app.command()(verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a foreseen error is one message and an exit code, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app(arguments)
    except RankleapError as error:
        print(f"rankleap: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
