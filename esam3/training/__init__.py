"""The loop, losses, concepts, caches, runs and the three stages. Imports from `evaluation` and below."""

# Written by hand; `lends` is of 00_core.
from esam3.core import lends

__all__, __getattr__ = lends(__name__, {
    "stage1": "run_stage1",
    "stage2": "run_stage2",
    "stage3": "run_stage3",
    "loop": "fit in_ranks",
    "feature_cache": "FeatureCache write_cache"})
