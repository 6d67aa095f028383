"""Coverage: receipts added up until every byte of every output has been written, and none twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeflow.errors import IncompleteOutput

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mergeflow.plan.plan import Output
    from mergeflow.tensors import Span


class Coverage:
    """What has been written of each output."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs = outputs
        self._spans: list[dict[int, int]] = [{} for _ in outputs]
        """For each output: begin -> end of spans that lie beyond the watermark."""
        self._watermarks = [output.data[0] for output in outputs]

    def add(self, spans: Iterable[Span]) -> None:
        """Note what a receipt says was written."""
        for span in spans:
            ahead = self._spans[span.output]
            if span.begin < self._watermarks[span.output] or span.begin in ahead:
                raise IncompleteOutput(f"{self._outputs[span.output].path}: byte {span.begin:,} was written twice")
            ahead[span.begin] = span.end
            while (end := ahead.pop(self._watermarks[span.output], None)) is not None:
                self._watermarks[span.output] = end

    def watermark(self, output: int) -> int:
        """The byte up to which that output is complete."""
        return self._watermarks[output]

    def check(self, indices: Iterable[int] | None = None) -> None:
        """Raise `IncompleteOutput` unless every byte of every output is there, or of those with these indices."""
        for index in range(len(self._outputs)) if indices is None else indices:
            output, watermark, ahead = self._outputs[index], self._watermarks[index], self._spans[index]
            if watermark != output.layout.size or ahead:
                raise IncompleteOutput(
                    f"{output.path}: written without a gap up to byte {watermark:,} of {output.layout.size:,}; "
                    "the draft was thrown away; please report this with the plan"
                )
