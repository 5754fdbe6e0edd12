"""The figures that tables can ask for, and how they are shown; `measures.py` finds them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A figure in tables. `scale` and `digits`: how it is shown; `lower`: whether less is better."""

    title: str
    scale: float = 100
    digits: int = 1
    unit: str = "%"
    lower: bool = False

    def shown(self, value: float) -> str:
        """Return a value as tables show it, without the unit."""
        return f"{self.scale * value:.{self.digits}f}"


METRICS = {
    "top1": Metric("top-1"),
    "top1_halfway": Metric("top-1 halfway"),
    "top5": Metric("top-5"),
    "loss": Metric("val loss", scale=1, digits=3, unit="", lower=True),
    "ece": Metric("ECE", lower=True),
    "token_accuracy": Metric("tokens right"),
    "token_miou": Metric("tokens, mIoU"),
    "teacher_accuracy": Metric("tokens as the teacher"),
    "probe_accuracy": Metric("linear probe of the tokens"),
    "probe_miou": Metric("linear probe, mIoU"),
    "image_probe": Metric("linear probe of the mean token"),
    "knn": Metric("nearest neighbours"),
    "label_truth": Metric("labels right"),
    "label_bytes": Metric("label bytes an image", scale=1, digits=0, unit=" B", lower=True),
    "step_s": Metric("time a step", scale=1000, digits=0, unit=" ms", lower=True),
}
