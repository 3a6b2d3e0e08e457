"""What a student is used by outside training: answers in files, the command line, sharing, a demo."""

# Written by hand; `lends` is of 00_core.
from esam3.core import lends

__all__, __getattr__ = lends(__name__, {
    "answers": "Answer overlay VideoAnswers",
    "demo": "Demo page to_space",
    "sharing": "model_card push to_share"})
