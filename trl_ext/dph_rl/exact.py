"""The divergence over the whole vocabulary at the positions of the rehearsed answers."""

import contextlib

import torch
from accelerate.utils import is_peft_model
from torch.utils.checkpoint import checkpoint

from .._trl import fused_head_settings
from ..kernels import paired_head_statistics
from ..training.adapters import use_reference_adapter
from ..training.modes import evaluation_mode
from ..training.scoring_head import head_parameters, require_linear_head


# Positions whose logits are materialized at once, for the reverse KL.
_POSITIONS = 128


class ExactDivergence:
    """
    KL divergences between the policy's next-token distributions and those of the start.

    Args:
        trainer ([`DPHRLTrainer`]):
            The trainer, whose model is the policy.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            The start; by default the policy without its adapter, or with the copy of it that TRL keeps.
    """

    def __init__(self, trainer, ref_model):
        self.trainer, self.ref_model = trainer, ref_model
        self.policy = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model
        for model in (self.policy, ref_model):
            if model is not None:
                require_linear_head(model)
        self.settings = fused_head_settings(self.policy)
        if ref_model is not None:
            ref_model.requires_grad_(False).eval().to(trainer.accelerator.device)
        temperature = float(trainer.temperature)
        if temperature != 1 and self.settings.softcap is not None:
            raise ValueError(
                f"`rehearsal_estimator='exact'` is not supported at `temperature={temperature:g}` with a model that "
                "caps its logits. Use `temperature=1.0` or `rehearsal_estimator='sampled'`."
            )
        self.logit_scale = self.settings.logit_scale / temperature

    @classmethod
    def of(cls, trainer, ref_model) -> "ExactDivergence | None":
        """
        The exact divergence of a trainer, `None` if it estimates the divergence at the saved tokens.

        Raises:
            `ValueError`: If there is no model of the start, or one without use; if the models are sharded.
        """
        args = trainer.args
        is_exact = args.rehearsal_coef != 0 and args.rehearsal_estimator == "exact"
        if ref_model is not None and not is_exact:
            raise ValueError(
                f"`ref_model` was given, a `{type(ref_model).__name__}`, but only `rehearsal_estimator='exact'` reads "
                "it. Leave `ref_model` out: the log-probabilities of the start are computed before training."
            )
        if not is_exact:
            return None
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "`rehearsal_estimator='exact'` is not supported with DeepSpeed or FSDP, since it reads the model's "
                "backbone and head apart. Use `rehearsal_estimator='sampled'`."
            )
        is_peft = is_peft_model(trainer.model)
        if is_peft == (ref_model is not None):
            raise ValueError(
                "`rehearsal_estimator='exact'` needs the model that training starts from: "
                + (
                    "it is the policy without its adapter. Leave `ref_model` out."
                    if is_peft
                    else "train an adapter (`peft_config`), or give a second copy of the model as `ref_model`."
                )
            )
        if ref_model is not None and ref_model is trainer.model:
            raise ValueError("`ref_model` is the model that is trained. Give a second copy of it.")
        return cls(trainer, ref_model)

    def __call__(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns the divergence at each position of the answers, and the log ratio of the token there, each of shape
        `(B, C)` and 0 where the mask is.
        """
        mask = batch["completion_mask"].bool()
        labels = batch["input_ids"][:, -mask.size(1) :][mask]
        policy = self._hidden(self.policy, batch, mask), *head_parameters(self.policy.get_output_embeddings())
        with torch.no_grad(), self._start() as model:
            start = self._hidden(model, batch, mask), *head_parameters(model.get_output_embeddings())
        if self.trainer.args.divergence == "forward_kl":
            logps, start_logps, kl = paired_head_statistics(
                policy[0],
                policy[1],
                start[0],
                start[1],
                labels,
                policy_bias=policy[2],
                ref_bias=start[2],
                logit_scale=self.logit_scale,
                softcap=self.settings.softcap,
            )
        else:
            logps, start_logps, kl = self._reverse_kl(policy, start, labels)
        empty = torch.zeros(mask.shape, dtype=kl.dtype, device=mask.device)
        return empty.masked_scatter(mask, kl), empty.masked_scatter(mask, (logps - start_logps).detach())

    def _hidden(self, model, batch: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """Hidden states that predict the answers' tokens, `(tokens, H)`."""
        with self.trainer.accelerator.autocast():
            output = getattr(model, self.settings.backbone)(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            )
        return output.last_hidden_state[:, -mask.size(1) - 1 : -1][mask]

    @contextlib.contextmanager
    def _start(self):
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        with use_reference_adapter(model), evaluation_mode(model):
            yield self.policy

    def _logprobs(self, hidden, weight, bias) -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias).float() * self.logit_scale
        softcap = self.settings.softcap
        return (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)

    def _reverse_kl(self, policy, start, labels):
        """KL(policy || start), whose logits are materialized for a few positions at a time, in the backward again."""

        def part(hidden, start_hidden, labels):
            logprobs = self._logprobs(hidden, *policy[1:])
            with torch.no_grad():
                start_logprobs = self._logprobs(start_hidden, *start[1:])
            kl = (logprobs.exp() * (logprobs - start_logprobs)).sum(-1)
            picked = [values.gather(-1, labels[:, None]).squeeze(-1) for values in (logprobs, start_logprobs)]
            return *picked, kl

        pieces = zip(*(values.split(_POSITIONS) for values in (policy[0], start[0], labels)), strict=True)
        parts = [checkpoint(part, *piece, use_reentrant=False) for piece in pieces]
        return (torch.cat(values) for values in zip(*parts, strict=True))
