"""The default workload's base model: a FLUX pipeline in miniature, trained on real handwritten digits."""

from lesa.reference.scorer import Scorer, load_scorer
from lesa.reference.train import train_flux_digits

__all__ = ["Scorer", "load_scorer", "train_flux_digits"]
