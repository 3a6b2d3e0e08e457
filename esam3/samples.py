"""`esam3.samples` is `esam3.data.samples`, under the name that people import it by."""

import sys

import esam3.data.samples as home

sys.modules[__name__] = home
