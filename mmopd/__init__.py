"""mmopd: multimodal on-policy distillation from several teachers.

The names in `__all__` are the public API. Each is imported when it is first used, so that `import mmopd` costs nothing.
"""

from typing import TYPE_CHECKING

from mmopd.lazy import importer

if TYPE_CHECKING:
    from mmopd.algorithm import balance_online, difficulty_weights, margin_mask, margin_shift, opd
    from mmopd.catalog import load_comparison, load_fleet, load_mixture, load_recipe, load_suite
    from mmopd.config import Comparison, Fleet, Mixture, Recipe, Suite, View
    from mmopd.errors import UserError
    from mmopd.prompts.index import index_tar
    from mmopd.prompts.shards import Shards, open_mixture
    from mmopd.prompts.tokens import TokenCounter
    from mmopd.prompts.writer import write_shards
    from mmopd.records import Outcome, Prompt
    from mmopd.task.base import Task, user_turn
    from mmopd.task.load import load_tasks

__version__ = "0.2.0"
__all__ = [
    "Comparison",
    "Fleet",
    "Mixture",
    "Outcome",
    "Prompt",
    "Recipe",
    "Shards",
    "Suite",
    "Task",
    "TokenCounter",
    "UserError",
    "View",
    "balance_online",
    "difficulty_weights",
    "index_tar",
    "load_comparison",
    "load_fleet",
    "load_mixture",
    "load_recipe",
    "load_suite",
    "load_tasks",
    "margin_mask",
    "margin_shift",
    "opd",
    "open_mixture",
    "user_turn",
    "write_shards",
]

_NAMES = {  # module -> the public names that it defines
    "mmopd.algorithm": "balance_online difficulty_weights margin_mask margin_shift opd",
    "mmopd.catalog": "load_comparison load_fleet load_mixture load_recipe load_suite",
    "mmopd.config": "Comparison Fleet Mixture Recipe Suite View",
    "mmopd.errors": "UserError",
    "mmopd.prompts": "Shards TokenCounter index_tar open_mixture write_shards",
    "mmopd.records": "Outcome Prompt",
    "mmopd.task.base": "Task user_turn",
    "mmopd.task.load": "load_tasks",
}
__getattr__ = importer(__name__, {name: module for module, names in _NAMES.items() for name in names.split()})
