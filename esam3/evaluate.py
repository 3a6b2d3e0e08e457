"""`esam3.evaluate` is `esam3.evaluation.evaluate`, under the name that people import it by."""

import sys

import esam3.evaluation.evaluate as home

sys.modules[__name__] = home
