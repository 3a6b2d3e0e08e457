"""`esam3.perceiver` is `esam3.models.perceiver`, under the name that people import it by."""

import sys

import esam3.models.perceiver as home

sys.modules[__name__] = home
