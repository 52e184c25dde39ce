r"""
A value network as baseline: what a chain is worth at a node, from its latent there.

    "latent"    V(x) = network(x)
    "reward"    V(x) = w reward(predicted clean image) + (1 - w) network(x),    w = share of signal at the node

The second is the form of Score as Action: it is exact at the image, where `w` is 1. The paper's own coefficients could
not be checked. It costs a decode and a reward a node.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..diffusion.rollouts import Rollout
from ..training.seeds import derive_seed, forked_random_state


WIDTH = 64
LEARNING_RATE = 1e-3
PASSES = 4  # gradient steps on a window


class LatentValue(nn.Module):
    """
    Two strided convolutions on a latent, their mean over the image, and the number of the node. It starts at 0.

    Args:
        channels (`int`):
            Channels of the latents.
        num_nodes (`int`):
            Nodes with a noisy step.
    """

    def __init__(self, channels: int, num_nodes: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.nodes = nn.Embedding(num_nodes, WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, latents: torch.Tensor, node: int) -> torch.Tensor:
        """Values of shape `(B,)`, of latents `(B, C, h, w)` at a node."""
        return self.head(self.convolutions(latents).mean((2, 3)) + self.nodes.weight[node]).squeeze(1)


class ValueBaseline:
    """
    Keeps a [`LatentValue`] and fits it to the returns of every window, after its values were taken from the returns:
    a baseline that has seen what it is taken from would bias the gradient.

    The values of a window are the sum of a part that is known before the network, from the reward of the predicted
    clean images, and of the network's.

    Args:
        trainer ([`ScoreAsActionTrainer`]):
            The trainer, which need not be complete yet.
        args ([`ScoreAsActionConfig`]):
            Its configuration.
    """

    def __init__(self, trainer, args):
        self.trainer, self.kind = trainer, args.value_network
        sampler, nodes = trainer.sampler, range(trainer.sampler.num_noisy_steps)
        self.signal = [sampler.share_of_signal(node) if self.kind == "reward" else 0.0 for node in nodes]
        device = args.device
        with forked_random_state(device):
            torch.manual_seed(derive_seed("value", args.seed))
            network = LatentValue(trainer.family.latent_channels, trainer.sampler.num_noisy_steps)
        self.network = network.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE)

    def known(
        self, rollouts: Sequence[Rollout], rows: Sequence[int], in_units: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """
        The part of the values that does not come from the network, of all processes' images and of shape
        `(N, K - 1)`: rewards of the clean images that the policy predicted at each noisy step, times the share of
        signal there; 0 for `"latent"`. An image without a reward gets the mean of the others.

        Args:
            rollouts (`Sequence[Rollout]`):
                This process's images.
            rows (`Sequence[int]`):
                Row of the dataset of each group, of all processes.
            in_units (`Callable`):
                From rewards of the window's images, `(N,)`, to what the returns are made of.
        """
        trainer, nodes = self.trainer, len(self.signal)
        latents = torch.cat([rollout.latents for rollout in rollouts])
        total = len(rows) * trainer.args.num_generations
        if self.kind != "reward":
            return latents.new_zeros(total, nodes)
        means = torch.cat([rollout.means for rollout in rollouts])
        columns = []
        for node in range(nodes):
            clean = trainer.sampler.predicted_clean(latents[:, node], means[:, node], node)
            rewards = in_units(trainer.gather(self._rewards(clean, rows)))
            missing = rewards.isnan()
            average = rewards[~missing].mean() if not missing.all() else rewards.new_zeros(())
            columns.append(self.signal[node] * torch.where(missing, average, rewards))
        return torch.stack(columns, 1)

    def _rewards(self, latents: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Rewards of this process's predicted images; NaN where the image is not finite."""
        trainer = self.trainer
        first, size = trainer.accelerator.process_index * len(latents), trainer.args.num_generations
        items = [trainer.train_dataset.row(rows[image // size]) for image in range(first, first + len(latents))]
        columns = {name: [item["columns"][name] for item in items] for name in items[0]["columns"]}
        pixels = trainer.decode(latents)
        is_finite = pixels.flatten(1).isfinite().all(1)
        sums, _ = trainer.rewards([item["prompt"] for item in items], pixels.nan_to_num(0.0), **columns)
        return sums.masked_fill(~is_finite.to(sums.device), torch.nan)

    def values(self, rollouts: Sequence[Rollout], known: torch.Tensor) -> torch.Tensor:
        """Values of all processes' images at each noisy step, of shape `(N, K - 1)`, from the result of `known`."""
        latents = torch.cat([rollout.latents for rollout in rollouts])
        with torch.no_grad():
            parts = [(1 - share) * self.network(latents[:, node], node) for node, share in enumerate(self.signal)]
        return known + self.trainer.gather(torch.stack(parts, 1))

    def fit(
        self, rollouts: Sequence[Rollout], known: torch.Tensor, values: torch.Tensor, returns: torch.Tensor
    ) -> None:
        """
        Fits the network by squared error.

        Args:
            rollouts (`Sequence[Rollout]`):
                This process's images.
            known, values, returns (`torch.Tensor` of shape `(N, K - 1)`):
                Results of `known` and `values`, and what follows from each node on, of all processes' images. Returns
                are NaN for no opinion.
        """
        trainer = self.trainer
        counted = ~returns.isnan().any(1)
        spread = (returns[counted] - returns[counted].mean(0)).square().sum()
        if spread > 0:
            explained = 1 - (returns[counted] - values[counted].to(returns)).square().sum() / spread
            trainer._window["train"].add("value/explained_variance", explained.item())
        latents = torch.cat([rollout.latents for rollout in rollouts])
        first = trainer.accelerator.process_index * len(latents)
        own = slice(first, first + len(latents))
        targets = (returns - known.to(returns))[own].nan_to_num().to(latents)
        weights = counted[own].to(latents) / counted.sum().clamp(min=1) / returns.shape[1]
        parameters = list(self.network.parameters())
        for _ in range(PASSES):
            self.optimizer.zero_grad()
            for node in range(returns.shape[1]):
                value = (1 - self.signal[node]) * self.network(latents[:, node], node)
                error = (value - targets[:, node]).square()
                (error * weights).sum().backward()
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad = trainer.accelerator.reduce(parameter.grad, reduction="sum")
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        states = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"kind": self.kind, **states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("kind", "latent") != self.kind:
            return  # what it has learned is another part of the value: it starts to learn here
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
