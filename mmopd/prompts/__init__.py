"""Prompts on disk and the order in which they are drawn."""

from mmopd.prompts.index import index_tar
from mmopd.prompts.prompt_plan import PromptPlan, Rows
from mmopd.prompts.rows import RowError
from mmopd.prompts.shards import Shards, open_mixture
from mmopd.prompts.tokens import TokenCounter
from mmopd.prompts.writer import write_shards

__all__ = ["PromptPlan", "RowError", "Rows", "Shards", "TokenCounter", "index_tar", "open_mixture", "write_shards"]
