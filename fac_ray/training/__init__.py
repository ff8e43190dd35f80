"""The controlled experiment: arms of equal size and label balance, and one classifier fitted for each arm and seed."""

from fac_ray.training.arms import build_arms
from fac_ray.training.classification import train_arms

__all__ = ["build_arms", "train_arms"]
