"""The difference between the log-probabilities of vLLM, which samples, and of the trainer, which scores."""

import math
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather


logger = get_logger(__name__)

# Mean absolute difference per token above which a warning says so.
_LARGE = 0.05


class VLLMDifference:
    """
    Has vLLM return the log-probabilities of its first generation, which RLOO does not ask for, and compares them.

    Args:
        engine ([`~trl.generation.vllm_generation.VLLMGeneration`], *optional*):
            TRL's vLLM class of the trainer. Without one nothing is compared.
    """

    def __init__(self, engine: Any | None):
        self.engine = engine  # until the first generation has been compared
        self.logps: list[list[list[float]]] = []
        if engine is not None:
            engine.logprobs, engine.generate = 0, self._keep_logps

    def _keep_logps(self, *args, **kwargs):
        engine: Any = self.engine
        found = type(engine).generate(engine, *args, **kwargs)
        self.logps = found[2]
        return found

    def record(self, metrics: dict[str, list[float]], scored: torch.Tensor, mask: torch.Tensor) -> None:
        """
        Adds the mean and the largest absolute difference per token of the first generation, over all processes, under
        GRPO's names; warns if the mean is large. vLLM is left as it was before.

        Args:
            metrics (`dict[str, list[float]]`):
                The trainer's, which it logs.
            scored (`torch.Tensor` of shape `(B, T)`):
                Log-probabilities of the tokens under the trainer's model.
            mask (`torch.Tensor` of shape `(B, T)`):
                1 on the tokens.
        """
        if self.engine is None:
            return
        self.engine.logprobs = None
        del self.engine.generate
        self.engine = None
        sampled = torch.zeros_like(scored, dtype=torch.float32)
        for row, values in zip(sampled, self.logps, strict=True):
            row[: len(values)] = torch.tensor([math.nan if value[0] is None else value[0] for value in values])
        difference = torch.where(mask.bool(), (scored.float() - sampled).abs(), 0.0)
        # A log-probability that vLLM does not give is no difference.
        difference = difference.nan_to_num(0.0)
        total, count = gather(torch.stack([difference.sum(), mask.sum().float()]).unsqueeze(0)).sum(0).tolist()
        found = {"mean": total / max(count, 1.0), "max": gather(difference.max().unsqueeze(0)).max().item()}
        if found["mean"] > _LARGE:
            logger.warning(
                f"The log-probabilities of vLLM and of the trainer differ by {found['mean']:.3f} nats a token on "
                "average. RLOO does not correct for it, nor does the normalizer of f-DPG: compare the precisions of "
                "both, or sample with `use_vllm=False`."
            )
        for name, value in found.items():
            metrics[f"sampling/sampling_logp_difference/{name}"].append(value)
