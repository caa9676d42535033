"""Base models trained here from nothing: pipelines in miniature, on pictures that ship with scikit-learn."""

from lesa.reference.data_sets import DATA_SETS, DataSet
from lesa.reference.distillation import distil
from lesa.reference.scorer import Scorer, load_scorer
from lesa.reference.students import STUDENTS, Student
from lesa.reference.train import train_base

__all__ = ["DATA_SETS", "STUDENTS", "DataSet", "Scorer", "Student", "distil", "load_scorer", "train_base"]
