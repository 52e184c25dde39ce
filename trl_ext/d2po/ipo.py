"""IPO (https://huggingface.co/papers/2310.12036), as a loss of D2PO's pairs."""

from ..losses import ipo_loss
from ..preference import Method, PairLoss, ResponseScores


class IPO(Method):
    """IPO's loss on log ratios summed over the response, as in the paper. Its only parameter is `beta`."""

    name = "IPO"

    def pair_loss(self, chosen: ResponseScores, rejected: ResponseScores) -> PairLoss:
        losses = ipo_loss(chosen.logratios, rejected.logratios, beta=self.args.beta)
        return PairLoss(losses, *(self.args.beta * side.logratios.detach() for side in (chosen, rejected)))
