"""Turn a config into settings and parts."""

from oprd_tune.config.components import Component, construct
from oprd_tune.config.parts import Parts, resolve
from oprd_tune.config.settings import OPDSettings, OPRDSettings

__all__ = ["Component", "OPDSettings", "OPRDSettings", "Parts", "construct", "resolve"]
