"""
Metrics as numerators and denominators until the log, so that every mean is one over pairs or tokens, however they are
split.
"""

import torch


class StepMetrics:
    """
    Metrics of one micro-step.

    Args:
        device (`torch.device`):
            Where the metrics are computed.
        num_pairs (`int`):
            Pairs of the batch, `B`.
        counted (`torch.Tensor` of shape `(B,)`, *optional*):
            `False` for a pair that is in the batch only to fill it up (see [`MeteredTrainer.counted_pairs`]): it has
            no part in any mean.
        averages_steps (`bool`, *optional*, defaults to `False`):
            Take a mean over tokens of each micro-step, and of these the mean over the pairs of all micro-steps, as
            TRL's trainers log it in training. Otherwise it is one over the tokens of all micro-steps.
    """

    def __init__(
        self,
        device: torch.device,
        num_pairs: int,
        counted: torch.Tensor | None = None,
        averages_steps: bool = False,
    ):
        self.device = device
        self._num_pairs = num_pairs if counted is None else counted.sum()
        self._counted = counted
        self._averages_steps = averages_steps
        self._over_tokens: list[bool] = []
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor | int]] = {}
        self.num_totals = 0

    def mean(self, name: str, values: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """
        Mean of `values`, whose first dimension is that of the pairs or a multiple of it, over those `where` is true.
        """
        values = values.detach().float()
        over_tokens = values.dim() > 1
        if self._counted is not None:
            rows = self._counted.repeat(len(values) // len(self._counted))
            rows = rows.reshape(-1, *(1 for _ in values.shape[1:])).expand_as(values)
            where = rows if where is None else where & rows
        if where is None:
            self._put(name, values.sum(), values.numel(), over_tokens)
        else:
            # `where` instead of a product: a masked position may hold inf.
            self._put(name, torch.where(where, values, 0.0).sum(), where.sum(), over_tokens)

    def batch_value(self, name: str, value: torch.Tensor) -> None:
        """A number of the whole batch, which counts as many times as the batch has pairs."""
        self._put(name, value.detach().float().reshape(()) * self._num_pairs, self._num_pairs)

    def total(self, name: str, value: torch.Tensor) -> None:
        """Sum of `value` over the processes. Totals come before all means."""
        self._put(name, value.detach().float(), 0)
        self.num_totals += 1

    def _put(self, name: str, numerator: torch.Tensor, denominator, over_tokens: bool = False) -> None:
        self._sums[name] = (numerator, denominator)
        self._over_tokens.append(over_tokens)

    def reduce(self, accelerator) -> tuple[list[str], torch.Tensor]:
        """
        The names, and the numerators and denominators over all processes, of shape `(2, len(names))`: one
        communication, no host sync.
        """
        self._put("num_pairs", torch.as_tensor(self._num_pairs, dtype=torch.float32, device=self.device), 0)
        names = list(self._sums)
        numerators = torch.stack([numerator.to(self.device) for numerator, _ in self._sums.values()])
        denominators = torch.stack(
            [torch.as_tensor(d, dtype=torch.float32, device=self.device) for _, d in self._sums.values()]
        )
        sums = torch.stack([numerators, denominators])
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        num_pairs, sums = sums[0, -1], sums[:, :-1]
        if self._averages_steps and any(self._over_tokens):
            of_step = torch.stack([sums[0] / sums[1].clamp(min=1.0), (sums[1] > 0).float()]) * num_pairs
            over_tokens = torch.tensor(self._over_tokens[:-1], device=self.device)
            sums = torch.where(over_tokens, of_step, sums)
        return names[:-1], sums


class MetricWindow:
    """
    Numerators and denominators since the last log. Those of the newest micro-steps stay on the device until they are
    read.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[list[str], torch.Tensor]] = []
        # Name -> numerator, denominator, number of micro-steps.
        self._sums: dict[str, list[float]] = {}
        self._earlier_means: dict[str, list[float]] = {}

    def append(self, names: list[str], sums: torch.Tensor) -> None:
        """Adds the result of [`StepMetrics.reduce`]."""
        self._steps.append((names, sums))

    def add(self, name: str, numerator: float, denominator: float = 1.0) -> None:
        """Adds a value that is on the host already."""
        entry = self._sums.setdefault(name, [0.0, 0.0, 0])
        entry[0] += numerator
        entry[1] += denominator
        entry[2] += 1

    def pop_means(self) -> dict[str, float]:
        """Name -> mean since the last call, of those that have one; empties the window."""
        self._collect()
        for name, earlier in self._earlier_means.items():
            # Each counts as much as a micro-step since did on average.
            _, denominator, steps = self._sums.get(name, (0.0, 1.0, 1))
            self.add(name, sum(earlier) * denominator / steps, len(earlier) * denominator / steps)
        means = {name: entry[0] / entry[1] for name, entry in self._sums.items() if entry[1] > 0}
        self.clear()
        return means

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added since the last log."""
        return not (self._steps or self._sums or self._earlier_means)

    def clear(self) -> None:
        self._steps.clear()
        self._sums.clear()
        self._earlier_means.clear()

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """The window, to be written to a checkpoint as JSON."""
        self._collect()
        sums = {name: list(entry) for name, entry in self._sums.items()}
        return {"sums": sums, "means": {name: list(means) for name, means in self._earlier_means.items()}}

    def load_state_dict(self, state: dict[str, dict[str, list[float]]]) -> None:
        """
        Restores the result of [`~MetricWindow.state_dict`]. `"means"` holds one mean per micro-step, which is all that
        trl_ext 0.1.0 wrote.
        """
        self.clear()
        self._sums.update({name: list(entry) for name, entry in state.get("sums", {}).items()})
        self._earlier_means.update({name: list(means) for name, means in state.get("means", {}).items() if means})

    def _collect(self) -> None:
        """Moves the values on the device to the host, in one transfer per set of names."""
        while self._steps:
            names = self._steps[0][0]
            run = 0
            while run < len(self._steps) and self._steps[run][0] == names:
                run += 1
            rows = torch.stack([sums for _, sums in self._steps[:run]]).tolist()
            del self._steps[:run]
            for numerators, denominators in rows:
                for name, numerator, denominator in zip(names, numerators, denominators, strict=True):
                    self.add(name, numerator, denominator)
