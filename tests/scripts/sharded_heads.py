"""
The token KL under FSDP2, in two processes: both models sharded, backbone and head, against the same models whole.

Run in two processes. Accelerate shards on accelerators only, PyTorch's `fully_shard` on CPUs too.
"""

import copy
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401 - sets the environment
import tiny  # noqa: E402
import torch  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from trl_ext.training.scoring_head import ScoringRequest, add_scoring_head  # noqa: E402


def score(model, reference, batch):
    """Gradients of a sum over the batch; the number of heads that were gathered by hand."""
    gathered = []
    full_tensor = DTensor.full_tensor
    DTensor.full_tensor = lambda self: gathered.append(self.shape) or full_tensor(self)
    try:
        kept = ScoringRequest(keep_states=True)
        with torch.no_grad():
            reference(**batch, scoring=kept)
        outputs = model(**batch, scoring=ScoringRequest(reference=kept.states))
        (outputs.log_probs.sum() + 2 * outputs.token_kl.sum()).backward()
    finally:
        DTensor.full_tensor = full_tensor
    return outputs, gathered


def main(trained_head: bool) -> None:
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    whole, whole_reference = tiny.model(0), tiny.model(1)
    for parameter in whole.get_output_embeddings().parameters():
        parameter.requires_grad_(trained_head)
    sharded, sharded_reference = copy.deepcopy(whole), copy.deepcopy(whole_reference)
    for model in (whole, whole_reference, sharded, sharded_reference):
        add_scoring_head(model)
    for model in (sharded, sharded_reference):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    # Each process has rows of its own; what FSDP averages over processes is then the mean of their gradients.
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    input_ids = torch.randint(0, 384, (4, 12), generator=generator)
    labels = input_ids.clone()
    labels[:, :5] = -100
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    outputs, gathered = score(sharded, sharded_reference, batch)
    expected, _ = score(whole, whole_reference, batch)
    for name in ("log_probs", "ref_log_probs", "token_kl", "entropy"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-6)
    assert outputs.token_kl.max() > 1e-3
    # The policy's own head is whole inside its forward; only the reference's has to be gathered, once.
    assert len(gathered) <= 1, gathered
    count = 0
    for parameter, truth in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert (parameter.grad is None) == (truth.grad is None)
        if truth.grad is not None:
            torch.distributed.all_reduce(truth.grad)
            torch.testing.assert_close(parameter.grad.full_tensor(), truth.grad / 2, rtol=1e-4, atol=1e-6)
            count += truth.grad.abs().max() > 0
    assert count > 10
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1] == "trained")
    print("sharded heads agree", flush=True)
    os._exit(0)  # the interpreter's own way out joins gloo's threads, and now and then aborts over them
