"""Prompts on disk and the order in which they are drawn."""

from typing import TYPE_CHECKING

from mmopd.lazy import importer

if TYPE_CHECKING:
    from mmopd.prompts.index import index_tar
    from mmopd.prompts.prompt_plan import PromptPlan, Rows
    from mmopd.prompts.rows import RowError
    from mmopd.prompts.shards import Shards, open_mixture
    from mmopd.prompts.tokens import TokenCounter
    from mmopd.prompts.writer import write_shards

__all__ = ["PromptPlan", "RowError", "Rows", "Shards", "TokenCounter", "index_tar", "open_mixture", "write_shards"]

__getattr__ = importer(
    __name__,
    {
        "PromptPlan": "mmopd.prompts.prompt_plan",
        "RowError": "mmopd.prompts.rows",
        "Rows": "mmopd.prompts.prompt_plan",
        "Shards": "mmopd.prompts.shards",
        "TokenCounter": "mmopd.prompts.tokens",
        "index_tar": "mmopd.prompts.index",
        "open_mixture": "mmopd.prompts.shards",
        "write_shards": "mmopd.prompts.writer",
    },
)
