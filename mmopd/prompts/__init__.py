"""Prompts on disk and the order in which they are drawn."""

from mmopd.prompts.index import index_tar
from mmopd.prompts.plan import Plan, Rows
from mmopd.prompts.shards import Shards, open_mixture, write_shards

__all__ = ["Plan", "Rows", "Shards", "index_tar", "open_mixture", "write_shards"]
