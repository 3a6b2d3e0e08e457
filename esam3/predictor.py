"""`esam3.predictor` is `esam3.models.predictor`, under the name that people import it by."""

import sys

import esam3.models.predictor as home

sys.modules[__name__] = home
