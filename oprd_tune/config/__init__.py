"""Turn a config into settings and parts."""

from oprd_tune.config.components import Component, construct
from oprd_tune.config.eval_section import EvalSection
from oprd_tune.config.parts import EvalParts, Parts, resolve
from oprd_tune.config.settings import EvalSettings, OPRDSettings

__all__ = [
    "Component",
    "EvalParts",
    "EvalSection",
    "EvalSettings",
    "OPRDSettings",
    "Parts",
    "construct",
    "resolve",
]
