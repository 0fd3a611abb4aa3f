"""Real images in [0, 1], split once and for all into train, selection and test, each with a digest."""

from cactus_ray.data.dataset import SPLITS, DataSet, calibration, load, load_split
from cactus_ray.data.splits import subset

__all__ = ["SPLITS", "DataSet", "calibration", "load", "load_split", "subset"]
