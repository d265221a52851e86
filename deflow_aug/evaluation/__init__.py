"""How close are synthetic degradations to real ones?  Needs paired pictures, and numpy only."""

from .divergences import akld, kld_noiseflow, kld_srgb
from .noise import NoiseStatistics, Pair, WhiteNoise, best_white_noise, load_pairs, noise_of
from .report import Comparison, Criterion, Reference, report, summary

__all__ = [
    "Comparison",
    "Criterion",
    "NoiseStatistics",
    "Pair",
    "Reference",
    "WhiteNoise",
    "akld",
    "best_white_noise",
    "kld_noiseflow",
    "kld_srgb",
    "load_pairs",
    "noise_of",
    "report",
    "summary",
]
