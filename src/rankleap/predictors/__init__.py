"""Reads a trajectory, gives a forecast of how it moves on. One row per published method or baseline."""

from rankleap.errors import UnknownNameError
from rankleap.predictors.baselines import Average, Hold
from rankleap.predictors.forecast import Forecast, Mixture, Predictor
from rankleap.predictors.linear import WeightLinear, Window
from rankleap.predictors.relex import Relex

PREDICTORS: dict[str, type[Predictor]] = {
    "hold": Hold,
    "average": Average,
    "weight-linear": WeightLinear,
    "window": Window,
    "relex": Relex,
}


def get_predictor(name: str, window: int | None = None) -> Predictor:
    """The predictor of that name; raises ``UnknownNameError`` with the closest ones."""
    if name not in PREDICTORS:
        raise UnknownNameError("predictor", name, PREDICTORS)
    return PREDICTORS[name](window=window)


__all__ = ["PREDICTORS", "Forecast", "Mixture", "Predictor", "get_predictor"]
