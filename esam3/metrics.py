"""`esam3.metrics` is `esam3.evaluation.metrics`, under the name that people import it by."""

import sys

import esam3.evaluation.metrics as home

sys.modules[__name__] = home
