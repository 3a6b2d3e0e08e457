"""What is looked at: views, surveys of data, memory attention. Imports from every floor."""

# Written by hand; `lends` is of 00_core.
from esam3.core import lends

__all__, __getattr__ = lends(__name__, {
    "figures": "figure markdown_table table",
    "views": "show_image outline clip_strip prompt_loop curves bars",
    "disagreement": "Pair open_pair",
    "memory_attention": "attention_weights"})
