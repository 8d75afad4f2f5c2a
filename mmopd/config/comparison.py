"""Models of recipes/compare_*.yaml: variants of a recipe, and the tables that compare them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from mmopd.settings_file import Config, Count, File, suggest


class Variant(Config):
    """One method of a comparison: the recipe with some settings changed."""

    label: str = Field("", description="Name in the tables. Empty: the variant's own name")
    set: Mapping[str, Any] = Field(
        {}, description="Changes to the recipe for this variant: key.path -> value, as on the command line"
    )


class ComparisonTable(Config):
    """Variants side by side, each with the same seeds."""

    title: str = Field(description="Heading of the table")
    seeds: Count = Field(
        3,
        description="Seeds that every variant runs with: 0, 1, ... 3 is the least that gives an interval worth showing",
    )
    baseline: str = Field(description="Variant that the others are paired with, seed by seed")
    variants: tuple[str, ...] = Field(description="Variants in the table, in the order of its rows")


class Comparison(File):
    """`recipes/compare_*.yaml`: a grid of variants and seeds over one recipe."""

    what: ClassVar[str] = "a comparison"
    use: ClassVar[str] = "`mmopd compare {path}` runs it"

    recipe: Path = Field(description="Recipe that all variants start from")
    set: Mapping[str, Any] = Field({}, description="Changes to the recipe for all variants: key.path -> value")
    variants: Mapping[str, Variant] = Field(description="Variants of the recipe by name")
    tables: Mapping[str, ComparisonTable] = Field(description="Tables of results by name")

    @model_validator(mode="after")
    def _tables_name_variants(self) -> Self:
        for name, table in self.tables.items():
            for variant in (table.baseline, *table.variants):
                if variant not in self.variants:
                    raise ValueError(f"tables.{name}: no variant {variant!r}{suggest(variant, self.variants)}")
        return self
