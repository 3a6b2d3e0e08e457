"""`esam3.disagreement` is `esam3.show.disagreement`, under the name that people import it by."""

import sys

import esam3.show.disagreement as home

sys.modules[__name__] = home
