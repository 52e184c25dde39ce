"""
The discriminator, which orders the pairs without a gold label.

It is the mean of one or more members, each of which scores a prompt and completion: a reward head on a further LoRA
adapter of the policy's own base, a separate sequence classifier, or the policy's implicit reward. The first two learn
from gold labels by the Bradley-Terry loss.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from peft import LoraConfig
from torch import nn
from torch.distributed.tensor import DTensor

from .._trl import pad
from ..judges.reward_models import RewardModel
from ..training.adapters import use_adapter
from ..training.last_states import as_batch, check_last_states, last_states
from ..training.modes import evaluation_mode, in_mode
from ..training.scoring_head import ScoringRequest
from ..training.seeds import derive_seed, seeded
from ..training.sharding import reshard, sharded_like, whole
from ..training.shared_prompt import SharedPrompts


@dataclass
class Sample:
    """A prompt and completion to score, as tokens of the policy and as text or messages."""

    prompt: Any
    prompt_ids: list[int]
    completion: Any
    completion_ids: list[int]


@dataclass
class GoldExample:
    """
    A comparison to learn from; `target` is the probability that `a` is better, `age` the windows since it was bought.
    """

    a: Sample
    b: Sample
    target: float
    age: int = 0

    @classmethod
    def from_entry(cls, entry: dict, window: int) -> "GoldExample":
        first, second = (
            Sample(entry["prompt"], entry["prompt_ids"], entry[f"completion_{side}"], entry[f"completion_{side}_ids"])
            for side in "ab"
        )
        return cls(first, second, target=entry["verdict"], age=max(0, window - entry["window"]))


# ---- Members -------------------------------------------------------------------------------------------------------


class AdapterMember:
    """
    A reward head on a LoRA adapter of the policy's base: `head(h)` of the last token's final hidden state.

    The head starts at zero, so a discriminator that has seen no gold scores everything alike and orders nothing. It is
    kept outside the PEFT model, in fp32: a head in `modules_to_save` would travel with the policy's weights to vLLM.

    Args:
        policy ([`~peft.PeftModel`]):
            The policy; the adapter is added to it, frozen.
        name (`str`):
            The adapter's name.
        config ([`~peft.LoraConfig`]):
            The adapter's configuration.
        pad_token_id (`int`):
            Pads batches.
        accelerator ([`~accelerate.Accelerator`]):
            Provides the device and the precision.
        prompts ([`~trl_ext.training.shared_prompt.SharedPrompts`], *optional*):
            Decides whether two completions of a prompt share it on one packed row; by default they never do.
    """

    def __init__(
        self,
        policy,
        name: str,
        config: LoraConfig,
        pad_token_id: int,
        accelerator: Accelerator,
        prompts: SharedPrompts | None = None,
    ):
        self.policy = policy
        self.name = name
        self.pad_token_id = pad_token_id
        self.accelerator = accelerator
        self.prompts = prompts or SharedPrompts("nobody asked for it")
        policy.add_adapter(name, config)
        base = self._base = policy.get_base_model()
        self.head = nn.Linear(base.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.head.to(accelerator.device)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        reshard(self.policy)
        parameters = {name: p for name, p in self.policy.named_parameters() if f".{self.name}." in name}
        return {**parameters, "head.weight": self.head.weight}

    @contextlib.contextmanager
    def active(self, training: bool):
        """
        Activates this member's adapter. Run both scoring and its backward inside: gradients reach only the active
        adapter.
        """
        with in_mode(training, self.policy), use_adapter(self.policy, self.name):
            yield

    def score(self, samples: list[Sample], may_share: bool = True) -> torch.Tensor:
        inputs = self._as_batch(samples)
        rows = self.prompts.rows(self._base, inputs) if may_share else None
        with self.accelerator.autocast():
            hidden = last_states(self._backbone, inputs, rows)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float()).squeeze(-1)

    def check_layout(self, samples: list[Sample]) -> None:
        with self.accelerator.autocast():
            check_last_states(self.prompts, self._base, self._backbone, self._as_batch(samples))

    def _backbone(self, **inputs):
        """The base's backbone, by the model's own forward: at its start and its end FSDP2 gathers and frees weights."""
        return self.policy(**inputs, scoring=ScoringRequest(backbone_only=True))

    def _as_batch(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        sequences = [sample.prompt_ids + sample.completion_ids for sample in samples]
        return as_batch(sequences, self.pad_token_id, self.accelerator.device)

    def save_pretrained(self, folder) -> None:
        """Saves the head; the adapter is saved with the policy's model."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": self.head.weight.detach().cpu()}, folder / "score_head.safetensors")


class ModelMember:
    """
    A sequence classifier with one output, full or with adapters of its own. It reads prompts and completions as every
    judge does that is made of a reward model: see [`~trl_ext.judges.RewardModel`].

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The classifier, or what `from_pretrained` loads it from; then with one output, and from safetensors only.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; loaded from where the model was by default.
        max_length (`int`, *optional*):
            Tokens kept of a text, from the end.
        accelerator ([`~accelerate.Accelerator`]):
            Provides the device and the precision.
        prompts ([`~trl_ext.training.shared_prompt.SharedPrompts`], *optional*):
            Decides whether two texts share what they begin with on one packed row; by default they never do.
    """

    def __init__(
        self, model, processing_class, max_length, accelerator: Accelerator, prompts: SharedPrompts | None = None
    ):
        self.reward_model = RewardModel(
            model,
            processing_class,
            max_length,
            model_init_kwargs={"num_labels": 1},
            tokenizer_argument="discriminator_processing_class",
        )
        self.model.to(accelerator.device)
        self.accelerator = accelerator
        self.prompts = prompts or SharedPrompts("nobody asked for it")

    @property
    def model(self) -> nn.Module:
        return self.reward_model.model

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def active(self, training: bool):
        with in_mode(training, self.model):
            yield

    def score(self, samples: list[Sample], may_share: bool = True) -> torch.Tensor:
        with self.accelerator.autocast():
            return self.reward_model.score(self._token_ids(samples), self.prompts if may_share else None)

    def check_layout(self, samples: list[Sample]) -> None:
        with self.accelerator.autocast():
            self.reward_model.check_layout(self._token_ids(samples), self.prompts)

    def _token_ids(self, samples: list[Sample]) -> list[list[int]]:
        return [self.reward_model.token_ids(sample.prompt, sample.completion) for sample in samples]

    def save_pretrained(self, folder) -> None:
        self.model.save_pretrained(folder)
        self.reward_model.processing_class.save_pretrained(folder)


class ImplicitRewardMember:
    """
    The policy's own implicit reward: log policy(completion | prompt) - log reference(completion | prompt), in
    evaluation mode and without gradient. It has no parameters: gold teaches it by way of the policy's own loss.

    Args:
        trainer ([`D2POTrainer`]): Scores policy and reference.
        pad_token_id (`int`): Pads batches.
    """

    def __init__(self, trainer, pad_token_id: int):
        self.trainer = trainer
        self.pad_token_id = pad_token_id

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return {}

    @contextlib.contextmanager
    def active(self, training: bool):
        with evaluation_mode(self.trainer.model):
            yield

    def score(self, samples: list[Sample], may_share: bool = True) -> torch.Tensor:
        inputs = self._as_batch(samples)
        with torch.no_grad(), self.trainer.accelerator.autocast():
            policy = self.trainer.score_policy(self.trainer.model, inputs)
            reference = policy.ref_log_probs
            if reference is None:
                reference = self.trainer.score_reference(inputs).log_probs
        return (policy.log_probs - reference).sum(dim=1)

    def check_layout(self, samples: list[Sample]) -> None:
        inputs = self._as_batch(samples)
        with self.trainer.accelerator.autocast():
            self.trainer.layout.check(self.trainer.model, inputs)
            self.trainer.reference.check_layout(inputs)

    def _as_batch(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        rows = [(torch.tensor(s.prompt_ids), torch.tensor(s.completion_ids)) for s in samples]
        parts = {
            "input_ids": ([torch.cat(row) for row in rows], self.pad_token_id),
            "attention_mask": ([torch.ones_like(torch.cat(row)) for row in rows], 0),
            "completion_mask": ([torch.cat([torch.zeros_like(p), torch.ones_like(c)]) for p, c in rows], 0),
        }
        device = self.trainer.accelerator.device
        return {
            name: pad(values, padding_value=value, padding_side="right").to(device)
            for name, (values, value) in parts.items()
        }

    def save_pretrained(self, folder) -> None:
        pass


# ---- The whole -----------------------------------------------------------------------------------------------------


class Discriminator:
    """
    The mean of its members' scores, trained on gold by the Bradley-Terry loss.

    With target p, the probability that a is better, the loss of a comparison is
    `-p log sigmoid(s_a - s_b) - (1 - p) log sigmoid(s_b - s_a)`; a tie has p = 0.5 and draws the scores together.

    In several processes each computes its share of every batch's gradient; the sum is the same on all, so the members
    are.

    Args:
        members (`list`): Members, all of one kind.
        learning_rate (`float`), batch_size (`int`), epochs (`int`):
            Learning rate of AdamW, without weight decay and with moments that persist; comparisons in a batch; passes.
        dropout_samples (`int`):
            Forwards with dropout that measure a single member's disagreement.
        seed (`int`): Seed of shuffling, replay and dropout.
        accelerator ([`~accelerate.Accelerator`]): Sums gradients over processes.
    """

    optimizer: torch.optim.AdamW | None = None

    def __init__(
        self,
        members: list,
        *,
        learning_rate: float,
        batch_size: int,
        epochs: int,
        dropout_samples: int,
        seed: int,
        accelerator: Accelerator,
    ):
        self.members = members
        self.batch_size = batch_size
        self.epochs = epochs
        self.dropout_samples = dropout_samples
        self.seed = seed
        self.accelerator = accelerator
        self.updates = 0  # optimizer steps taken
        self._has_layout: set[int] = set()  # members that need no comparison of the layouts any more
        self._learning_rate = learning_rate
        self.prepare()

    def prepare(self) -> None:
        """
        Makes the optimizer of the members' parameters, unless it is there. To be called again once the policy is
        prepared for training: FSDP2 replaces its parameters, the adapters' among them.
        """
        parameters = list(self._named_parameters().values())
        self.is_trainable = bool(parameters)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]} if self.optimizer else set()
        if parameters and known != {id(parameter) for parameter in parameters}:
            self.optimizer = torch.optim.AdamW(parameters, lr=self._learning_rate, weight_decay=0.0)

    def _named_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{i}.{name}": parameter
            for i, member in enumerate(self.members)
            for name, parameter in member.named_parameters().items()
        }

    # ---- Scoring ---------------------------------------------------------------------------------------------------

    def score(self, samples: list[Sample]) -> list[float]:
        """
        Score of each sample, without dropout and gradient. Every process must call it, with samples of its own;
        completions of one prompt should follow each other, as they then share it.
        """
        return self._member_scores(samples).mean(dim=0).tolist()

    def _member_scores(self, samples: list[Sample]) -> torch.Tensor:
        """`(members, N)`, in chunks of two samples a comparison of a training batch."""
        scores = torch.empty(len(self.members), len(samples))
        size = 2 * self.batch_size
        for index, member in enumerate(self.members):
            with torch.no_grad(), member.active(training=False):
                for start in range(0, len(samples), size):
                    chunk = range(start, min(start + size, len(samples)))
                    order = [*chunk[::2], *chunk[1::2]]  # neighbors into the two halves, which packed rows let share
                    ordered = [samples[i] for i in order]
                    self._check_layout(index, ordered)
                    scores[index, order] = member.score(ordered).float().cpu()
        return scores

    def disagreement(self, first: list[Sample], second: list[Sample], *seed) -> list[float]:
        """
        Standard deviation of the probability that the first is better, over the members, or over `dropout_samples`
        forwards with dropout where there is one. Every process must call it.
        """
        if len(self.members) > 1:
            in_pairs = [sample for pair in zip(first, second, strict=True) for sample in pair]
            scores = self._member_scores(in_pairs)
            margins = scores[:, ::2] - scores[:, 1::2]
        else:
            member, rows = self.members[0], []
            with torch.no_grad(), member.active(training=True):
                for i in range(self.dropout_samples):
                    with seeded(self.accelerator.device, self.seed, "dropout", i, *seed):
                        rows.append(self._independently(member, first + second))
            scores = torch.stack(rows)
            margins = scores[:, : len(first)] - scores[:, len(first) :]
        return torch.sigmoid(margins).std(dim=0).tolist()

    def _independently(self, member, samples: list[Sample]) -> torch.Tensor:
        """Scores under dropout. On a shared prompt both completions would see the same noise."""
        size = 2 * self.batch_size
        chunks = [samples[i : i + size] for i in range(0, len(samples), size)]
        return torch.cat([member.score(chunk, may_share=False) for chunk in chunks]).float().cpu()

    def _check_layout(self, index: int, samples: list[Sample]) -> None:
        """Decides, the first time, whether a member's samples share their prompts. Every process must call it."""
        if index not in self._has_layout:
            self._has_layout.add(index)
            with torch.no_grad():
                self.members[index].check_layout(samples)

    # ---- Learning --------------------------------------------------------------------------------------------------

    def learn(self, examples: list[GoldExample], replay_decay: float, *seed) -> float | None:
        """
        Passes over gold labels: every fresh one (age 0) in each pass, an older one with probability
        `replay_decay ** age`. All processes give the same examples.

        Returns:
            `float`: Mean loss, or `None` if there was nothing to learn from.
        """
        if not self.is_trainable or not examples:
            return None
        total = count = 0.0
        for index, member in enumerate(self.members):
            with member.active(training=False):
                self._check_layout(index, [getattr(e, side) for side in "ab" for e in examples[: self.batch_size]])
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "learn", index, *seed))
            with (
                member.active(training=True),
                seeded(self.accelerator.device, self.seed, "learn", index, self.accelerator.process_index, *seed),
            ):
                for _ in range(self.epochs):
                    draws = torch.rand(len(examples), generator=generator).tolist()
                    kept = [e for e, draw in zip(examples, draws, strict=True) if draw < replay_decay**e.age]
                    order = torch.randperm(len(kept), generator=generator).tolist()
                    for start in range(0, len(order), self.batch_size):
                        batch = [kept[i] for i in order[start : start + self.batch_size]]
                        total += self._step(member, batch) * len(batch)
                        count += len(batch)
        return total / count if count else None

    def _step(self, member, batch: list[GoldExample]) -> float:
        parameters = list(member.named_parameters().values())
        for parameter in parameters:
            parameter.grad = None
        own = batch[self.accelerator.process_index :: self.accelerator.num_processes]
        # A process without a share computes a loss of zero: where the policy is sharded, every forward is one of all.
        share = own or batch[:1]
        scores = member.score([e.a for e in share] + [e.b for e in share])
        margins = scores[: len(share)] - scores[len(share) :]
        targets = torch.tensor([e.target for e in share], device=margins.device)
        losses = -targets * F.logsigmoid(margins) - (1 - targets) * F.logsigmoid(-margins)
        loss = losses.sum() * bool(own) / len(batch)
        loss.backward()
        loss = self._sum_over_processes(loss.detach(), parameters)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The discriminator's loss is {loss.item()}. Lower `discriminator_learning_rate`; nothing was saved "
                "over the last checkpoint."
            )
        assert self.optimizer is not None
        self.optimizer.step()
        # The policy's optimizer must not see the discriminator's gradients.
        for parameter in parameters:
            parameter.grad = None
        self.updates += 1
        return loss.item()

    def _sum_over_processes(self, loss: torch.Tensor, parameters: list[nn.Parameter]) -> torch.Tensor:
        """Sums the parameters' gradients over all processes, and the loss, which it returns."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return loss
        copied = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        for parameter in parameters:
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                parameter.grad.mul_(processes)  # FSDP2 has averaged them
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in copied]
        flat = torch.cat([loss.reshape(1).float(), *(g.reshape(-1).float() for g in gradients)])
        flat = self.accelerator.reduce(flat, reduction="sum")
        pieces = flat[1:].split([p.numel() for p in copied])
        for parameter, piece in zip(copied, pieces, strict=True):
            parameter.grad = piece.view_as(parameter).to(parameter.dtype)
        return flat[0]

    # ---- State -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer state as whole tensors by name. Every process must call it."""
        state = {}
        for name, parameter in self._named_parameters().items():
            state[f"weight/{name}"] = whole(parameter.detach())
            moments = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            for key, value in moments.items():
                state[f"optimizer/{key}/{name}"] = whole(value)
        state["updates"] = torch.tensor(self.updates)
        return {name: value.cpu().contiguous().clone() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert self.optimizer is not None
        self.updates = int(state["updates"])
        parameters = self._named_parameters()
        expected = {name.removeprefix("weight/") for name in state if name.startswith("weight/")}
        if expected != parameters.keys():
            raise ValueError(
                f"The checkpoint's discriminator has other weights than this one, such as "
                f"{sorted(expected ^ parameters.keys())[:3]}. Resume with the `discriminator` settings of the run."
            )
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(sharded_like(state[f"weight/{name}"], parameter))
            moments = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = state.get(f"optimizer/{key}/{name}")
                if value is not None:
                    # AdamW counts its steps on the CPU.
                    moments[key] = value.clone() if key == "step" else sharded_like(value, parameter)
            if moments:
                self.optimizer.state[parameter] = moments

    def save_pretrained(self, folder) -> None:
        for index, member in enumerate(self.members):
            member.save_pretrained(folder if index == 0 else folder.with_name(f"{folder.name}_{index}"))
