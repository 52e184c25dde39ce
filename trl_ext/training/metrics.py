"""Metrics of a step, reduced over processes in one communication and read by the host once a log."""

from collections import defaultdict

import torch


class StepMetrics:
    """
    Metrics of one micro-step as numerators and denominators, so that means over pairs and over tokens come out right
    whatever the split over processes.

    Args:
        device (`torch.device`):
            Where the metrics are computed.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor | int]] = {}

    def mean(self, name: str, values: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Mean of `values`, over all of them or over those `where` the mask is true."""
        values = values.detach().float()
        if where is None:
            self._sums[name] = (values.sum(), values.numel())
        else:
            # `where` instead of a product: a masked position may hold inf.
            self._sums[name] = (torch.where(where, values, 0.0).sum(), where.sum())

    def total(self, name: str, value: torch.Tensor) -> None:
        """Sum of `value` over the processes."""
        self._sums[name] = (value.detach().float(), 0)

    def reduce(self, accelerator) -> tuple[list[str], torch.Tensor]:
        """The names and their values over all processes, of shape `(len(names),)`: one communication, no host sync."""
        names = list(self._sums)
        numerators = torch.stack([numerator.to(self.device) for numerator, _ in self._sums.values()])
        denominators = torch.stack(
            [torch.as_tensor(d, dtype=torch.float32, device=self.device) for _, d in self._sums.values()]
        )
        stacked = torch.stack([numerators, denominators])
        if accelerator.num_processes > 1:
            stacked = accelerator.reduce(stacked, reduction="sum")
        numerators, denominators = stacked
        return names, numerators / denominators.clamp(min=1.0)


class MetricWindow:
    """Values of the micro-steps since the last log, kept on the device until somebody reads them."""

    def __init__(self):
        self._steps: list[tuple[list[str], torch.Tensor]] = []

    def append(self, names: list[str], values: torch.Tensor) -> None:
        self._steps.append((names, values))

    def drain(self) -> dict[str, list[float]]:
        """Name -> its value at each micro-step, in one transfer to the host a set of names; empties the window."""
        drained = defaultdict(list)
        while self._steps:
            names = self._steps[0][0]
            run = 0
            while run < len(self._steps) and self._steps[run][0] == names:
                run += 1
            rows = torch.stack([values for _, values in self._steps[:run]]).tolist()
            del self._steps[:run]
            for row in rows:
                for name, value in zip(names, row, strict=True):
                    drained[name].append(value)
        return drained
