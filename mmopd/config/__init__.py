"""Settings of a run: frozen pydantic models, read from YAML (`mmopd.settings_file`); an unknown key is an error.

A recipe names a student, a fleet, a mixture and a suite by file, and holds the settings of a run. There is one module
for each kind of file. The models of the algorithm are in `mmopd.algorithm.settings`, and those of an objective in its
file. Every key has a description: docs/reference/ is generated from it, and `mmopd show --explain KEY` prints it.
"""

from mmopd.config.comparison import Comparison, ComparisonTable, Variant
from mmopd.config.engine import Engine
from mmopd.config.fleet import Fleet, Route, Teacher, View
from mmopd.config.mixture import Mixture, Source
from mmopd.config.recipe import Recipe
from mmopd.config.student import Rollout, Student, Sync
from mmopd.config.suite import Suite
from mmopd.config.train import Lora, Part, Train

__all__ = [
    "Comparison",
    "ComparisonTable",
    "Engine",
    "Fleet",
    "Lora",
    "Mixture",
    "Part",
    "Recipe",
    "Rollout",
    "Route",
    "Source",
    "Student",
    "Suite",
    "Sync",
    "Teacher",
    "Train",
    "Variant",
    "View",
]
