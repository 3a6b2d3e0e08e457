"""What is read: the toy world, files, samples, readers, recipes, batches. Imports from `core` and `schedules` alone."""

# Written by hand; `lends` is of 00_core.
from esam3.core import lends

__all__, __getattr__ = lends(__name__, {
    "recipes": "load_recipe open_dataset with_sampling",
    "batches": "Steps ImageBatch ClipBatch collate_images collate_clips augment",
    "samples": "BadSample ImageSample ClipSample Phrase Video",
    "toyfiles": "held_out"})
