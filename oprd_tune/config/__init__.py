"""Turn a config into settings and parts."""

from oprd_tune.config.components import Component, construct
from oprd_tune.config.eval_section import EvalSection
from oprd_tune.config.parts import EvalParts, Parts, resolve
from oprd_tune.config.settings import EvalSettings, OPRDSettings
from oprd_tune.config.several_teachers import ONLY_TEACHER

__all__ = [
    "ONLY_TEACHER",
    "Component",
    "EvalParts",
    "EvalSection",
    "EvalSettings",
    "OPRDSettings",
    "Parts",
    "construct",
    "resolve",
]
