"""Reads a trajectory, gives a forecast of how it moves on. One row per published method or baseline."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rankleap.errors import UnknownNameError
from rankleap.predictors.alpharl import AlphaRL
from rankleap.predictors.baselines import Average, Ema, FirstUpdate, Hold, RepeatLast
from rankleap.predictors.expo import Expo
from rankleap.predictors.forecast import Forecast, Mixture, Predictor, RankOne, require_same_steps
from rankleap.predictors.linear import WeightLinear, Window
from rankleap.predictors.next import NExt
from rankleap.predictors.reduced_rank import ReducedRank
from rankleap.predictors.relex import Relex
from rankleap.trajectory import Trajectory

ROWS = (
    Hold(),
    Average(),
    Ema(),
    FirstUpdate(),
    RepeatLast(),
    Expo(),
    WeightLinear(),
    Window(),
    ReducedRank(),
    Relex(),
    Relex(name="relex-shrunk", origin="last"),
    AlphaRL(),
    AlphaRL(name="alpharl-unscaled", rescaled=False),
    AlphaRL(name="alpharl-step", on_step=True),
    NExt(),
)
PREDICTORS: dict[str, Predictor] = {row.name: row for row in ROWS}


def get_predictor(name: str, window: int | None = None, scores: Mapping[int, float] | None = None) -> Predictor:
    """The predictor of that name; raises ``UnknownNameError`` with the closest ones.

    ``scores`` are accuracies by step (avg@k on a development split); methods that have no use for them do not get them.
    """
    if name not in PREDICTORS:
        raise UnknownNameError("predictor", name, PREDICTORS)
    row = PREDICTORS[name]
    given: dict[str, Any] = {"scores": tuple(sorted(scores.items()))} if scores and row.uses_scores else {}
    return replace(row, window=window, **given)


def read_forecast(saved: Mapping[str, Any], trajectory: Trajectory) -> Forecast:
    """Read what ``to_json`` gave, for its own trajectory; what is not linear is fitted again, to the same bits."""
    if "lines" in saved:
        return Mixture.from_json(saved, trajectory)
    require_same_steps(saved, trajectory)
    return replace(PREDICTORS[saved["method"]], **saved["settings"]).fit(trajectory)


__all__ = ["PREDICTORS", "Forecast", "Mixture", "Predictor", "RankOne", "get_predictor", "read_forecast"]
