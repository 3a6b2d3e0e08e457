"""`esam3.student` is `esam3.models.student`, under the name that people import it by."""

import sys

import esam3.models.student as home

sys.modules[__name__] = home
