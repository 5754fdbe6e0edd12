"""The options of `tokenlabel import-labels`. No torch, so that help comes at once."""

from __future__ import annotations

from dataclasses import dataclass

from tokenlabel.runtime.coercion import COUNT, Choice, check_numbers, coerced_fields


class PublishedLayout(Choice):
    """The order of the last two axes of a file: rows and columns, or columns and rows."""

    HW = "hw"
    WH = "wh"


@dataclass(frozen=True, kw_only=True)
@coerced_fields
class ImportConfig:
    """How label files are read."""

    num_classes: int
    """Classes of the teacher that made the files."""
    layout: PublishedLayout = PublishedLayout.HW
    """Order of the last two axes: hw for rows then columns, wh for columns then rows."""
    region: str = "full"
    """What of the image the maps show: full, or center:PCT for the centred square whose sides are PCT percent of the
    shorter side (95.6 for the published NFNet-F6)."""
    num_workers: int = 2
    """Threads that read files."""

    def __post_init__(self) -> None:
        check_numbers(self, num_classes="[2, inf)", num_workers=COUNT)
