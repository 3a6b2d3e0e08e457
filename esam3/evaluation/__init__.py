"""Any model on any recipe: protocols, predictions in each benchmark's form, official scores, costs. Imports from `models` and below."""

# Written by hand; `lends` is of 00_core.
from esam3.core import lends

__all__, __getattr__ = lends(__name__, {
    "evaluate": "run_scores",
    "metrics": "pcs_image pcs_video prompt_miou",
    "mask_metrics": "davis ytvos",
    "costs": "load_model"})
