"""
Time and memory of the paired head, forward and backward, beside other ways to the same three numbers a position.

- published: full fp32 logits of both models and the formula of the released TDPO code;
- composed: TRL's chunked log-probability head, twice, and its chunked divergence head;
- paired: `trl_ext.kernels.paired_head_statistics`;
- compiled: the same, with what is not a GEMM fused by `torch.compile`; measured on CUDA, or where it is named;
- floor: the GEMMs of the paired head (with a frozen head 4: two of logits, two of probabilities with the head; with a
  trained one 6: two of logits, the same again, two for gradients), in its tiles, and nothing else.

All get the same tensors and take turns; times are medians. Memory is the peak beyond the inputs: on CUDA the
allocator's, on a CPU the growth of the resident size of a process that does this and nothing else. It includes the
gradients, which no method can do without; their size is printed beside.

    python recipes/benchmarks/paired_head.py --tokens 1024 --vocabulary 49152 --hidden 576
    python recipes/benchmarks/paired_head.py --tokens 8192 --vocabulary 151936 --hidden 4096 \
        --dtype bfloat16 --device cuda
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time


METHODS = ("published", "composed", "paired", "compiled", "floor")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trained_head", action="store_true", help="gradient of the weight, too")
    parser.add_argument("--shared_head", action="store_true", help="one weight for both models, as with LoRA")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all that apply by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", help="also write the results to this file")
    parser.add_argument("--memory_of", choices=METHODS, help=argparse.SUPPRESS)  # used by the run itself
    options = parser.parse_args()
    if options.methods is None:
        options.methods = [name for name in METHODS if name != "compiled" or options.device.startswith("cuda")]
    return options


def make_inputs(options):
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    generator = torch.Generator(options.device).manual_seed(0)
    like = {"device": options.device, "dtype": getattr(torch, options.dtype), "generator": generator}
    hidden, ref_hidden = (torch.randn(options.tokens, options.hidden, **like) for _ in range(2))
    weight = torch.randn(options.vocabulary, options.hidden, **like).mul_(options.hidden**-0.5)
    ref_weight = weight if options.shared_head else weight + 0.01 * torch.randn(weight.shape, **like)
    labels = torch.randint(options.vocabulary, (options.tokens,), device=options.device, generator=generator)
    hidden.requires_grad_()
    if options.trained_head:
        weight.requires_grad_()
    return hidden, weight, ref_hidden, ref_weight, labels


def published(hidden, weight, ref_hidden, ref_weight, labels):
    import torch

    logits = (hidden @ weight.T).float()
    with torch.no_grad():
        ref_logits = (ref_hidden @ ref_weight.T).float()
    log_p = logits.log_softmax(-1)
    q = ref_logits.softmax(-1)
    log_q = q.log()
    kl = (q * (log_q - log_p)).sum(-1)
    picked = (values.gather(1, labels[:, None])[:, 0] for values in (log_p, log_q))
    return *picked, kl


def composed(hidden, weight, ref_hidden, ref_weight, labels):
    import torch

    from trl_ext._trl import ChunkedDivergenceFunction, ChunkedLogProbFunction

    def logps(states, head):
        return ChunkedLogProbFunction.apply(states, head, None, labels, 1.0, 32768, None, 1.0, ("log_probs",))[0]

    with torch.no_grad():
        ref_logps = logps(ref_hidden, ref_weight)
    kl, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, ref_hidden, ref_weight, None, 0.0)
    return logps(hidden, weight), ref_logps, kl


def paired(*inputs):
    from trl_ext.kernels import paired_head_statistics

    return paired_head_statistics(*inputs, compiled=False)


def compiled(*inputs):
    from trl_ext.kernels import paired_head_statistics

    return paired_head_statistics(*inputs, compiled=True)


def forward_and_backward(name, inputs) -> None:
    if name == "floor":
        return floor(*inputs)
    logps, _, kl = globals()[name](*inputs)
    (logps.sum() + kl.sum()).backward()


def floor(hidden, weight, ref_hidden, ref_weight, labels) -> None:
    import torch

    from trl_ext.kernels.paired_head import _tile_sizes

    rows, columns = _tile_sizes(len(hidden), len(weight), hidden.device, torch.float32)
    out = {"out_dtype": torch.float32} if hidden.device.type == "cuda" and hidden.dtype.itemsize == 2 else {}
    with torch.no_grad():
        totals = [torch.zeros_like(hidden, dtype=torch.float32) for _ in range(2)]
        for start in range(0, len(weight), columns):
            w, ref_w = weight[start : start + columns], ref_weight[start : start + columns]
            if not out:  # as everywhere off CUDA
                w, ref_w = w.float(), ref_w.float()
            for begin in range(0, len(hidden), rows):
                h, ref_h = hidden[begin : begin + rows].to(w.dtype), ref_hidden[begin : begin + rows].to(w.dtype)
                for _ in range(2 if weight.requires_grad else 1):
                    tiles = torch.mm(h, w.T, **out).to(w.dtype), torch.mm(ref_h, ref_w.T, **out).to(w.dtype)
                for total, tile in zip(totals[: 1 if weight.requires_grad else 2], tiles, strict=False):
                    total = total[begin : begin + rows]
                    torch.addmm(total, tile, w, **out, out=total)
                if weight.requires_grad:
                    torch.mm(tiles[0].T, h, **out)


def peak_memory(options) -> int:
    """Bytes beyond the inputs, on a CPU, in a process that does nothing else."""
    inputs = make_inputs(options)
    # What a first call allocates for good (the library's packing buffers) belongs to no method.
    small = argparse.Namespace(**{**vars(options), "tokens": 8, "vocabulary": 64})
    forward_and_backward(options.memory_of, make_inputs(small))
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux forgets the peak so far: making the inputs took more than some methods do
    before = resident("VmRSS")
    forward_and_backward(options.memory_of, inputs)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def main() -> None:
    options = parse_args()
    if options.memory_of:
        print(json.dumps(peak_memory(options)))
        return
    import torch

    cuda = options.device.startswith("cuda")
    memory = {}
    for name in options.methods:
        if name != "floor" and not cuda:
            command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            memory[name] = json.loads(done.stdout.splitlines()[-1])

    inputs = make_inputs(options)
    times = {name: [] for name in options.methods}
    too_large = set()
    for turn in range(options.rounds + 1):
        for name in options.methods:
            if name in too_large:
                continue
            for tensor in inputs[:2]:
                tensor.grad = None
            gc.collect()
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            try:
                forward_and_backward(name, inputs)
            except torch.OutOfMemoryError:
                too_large.add(name)
                continue
            if cuda:
                torch.cuda.synchronize()
            if turn > 0:  # the first warms up
                times[name].append(time.perf_counter() - start)
                if cuda:
                    memory[name] = max(memory.get(name, 0), torch.cuda.max_memory_allocated() - before)

    outputs = sum(tensor.numel() * tensor.element_size() for tensor in inputs[:2] if tensor.requires_grad)
    rows = {
        name: {"milliseconds": None, "mebibytes": None}
        if name in too_large
        else {"milliseconds": 1e3 * statistics.median(times[name]), "mebibytes": memory.get(name, 0) / 2**20}
        for name in options.methods
    }
    print(f"{options.tokens} x {options.vocabulary} x {options.hidden} {options.dtype} on {options.device}, ", end="")
    print(f"{'trained' if options.trained_head else 'frozen'} head, ", end="")
    print(f"{options.rounds} rounds; gradients {outputs / 2**20:.0f} MiB")
    for name, row in rows.items():
        if name in too_large:
            print(f"{name:10} does not fit into memory")
            continue
        print(f"{name:10} {row['milliseconds']:10.1f} ms {row['mebibytes']:10.0f} MiB")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "gradients_mebibytes": outputs / 2**20, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
