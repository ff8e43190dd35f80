"""Held-out metrics of the fits: the area under the precision-recall curve, and the arms compared by it."""

from fac_ray.evaluation.metrics import average_precision
from fac_ray.evaluation.summary import summarise_arms

__all__ = ["average_precision", "summarise_arms"]
