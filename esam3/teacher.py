"""`esam3.teacher` is `esam3.models.teacher`, under the name that people import it by."""

import sys

import esam3.models.teacher as home

sys.modules[__name__] = home
