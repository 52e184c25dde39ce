"""
Time of D2PO's sampling beside transformers' `generate` on the same prompts, in one process, in turns.

D2PO draws each completion from random numbers of its own, so that it does not depend on the batch; `generate` draws one
batch from one generator. Random weights hardly ever end a completion, so both sample `--completion_length` tokens.

    python recipes/benchmarks/generation_cost.py --shape llama-1b --prompts 64
"""

import argparse
import functools
import json
import statistics
import tempfile

from measuring import SHAPES, device_name, interval, make_model, make_trainer, quiet, take_turns


GENERATE, D2PO = "transformers' `generate`", "D2PO's sampler"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--mode", choices=["full", "lora", "qlora"], default="lora")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of a window, with two completions each")
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--completion_length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", help="also write the results to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_args()
    import torch

    from trl_ext import D2POConfig, D2POTrainer

    if options.threads:
        torch.set_num_threads(options.threads)
    quiet()
    options.no_gradient_checkpointing, options.attention = True, None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 1000, (options.prompts, options.prompt_length), generator=generator)
    rows = [{"prompt": " ".join(f"w{i}" for i in row)} for row in ids.tolist()]
    batch_size = 2 * options.prompts
    own = {
        "window_size": options.prompts,
        "max_completion_length": options.completion_length,
        "generation_batch_size": batch_size,
    }
    trainer_class = functools.partial(D2POTrainer, gold_labeller=lambda *pair, **columns: 1.0)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(options.shape, folder)
        trainer, wrapped = make_trainer(trainer_class, D2POConfig, own, options, model, folder, rows)
        wrapped.eval()
        prompts = ids.tolist()
        repeated = ids.repeat_interleave(2, dim=0).to(wrapped.device)
        lengths: dict[str, list[int]] = {GENERATE: [], D2PO: []}

        def step(name: str, index: int) -> None:
            if name == D2PO:
                seeds = [(index, i) for i in range(len(prompts))]
                groups = trainer.sampler(prompts, 2, seeds)
                count = sum(len(completion.ids) for group in groups for completion in group)
            else:
                with torch.no_grad(), trainer.accelerator.autocast():
                    sequences = wrapped.generate(
                        input_ids=repeated,
                        attention_mask=torch.ones_like(repeated),
                        do_sample=True,
                        top_k=0,  # the whole distribution, as D2PO samples it
                        max_new_tokens=options.completion_length,
                    )
                count = int((sequences[:, repeated.shape[1] :] != trainer.processing_class.pad_token_id).sum())
            lengths[name].append(count)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        times, _ = take_turns([GENERATE, D2PO], options, step)

    print(
        f"{options.shape}, {options.mode}, {batch_size} completions of {options.completion_length} tokens, prompts of "
        f"{options.prompt_length}, {device_name()}, torch {torch.__version__}"
    )
    print(f"| sampler | median of {options.rounds} | tokens/s | ratio (95% interval) |\n|---|---|---|---|")
    results = {}
    for name, seconds in times.items():
        ratios = [t / b for t, b in zip(seconds, times[GENERATE], strict=True)]
        low, high = interval(ratios)
        rates = [count / t for count, t in zip(lengths[name][options.warmup :], seconds, strict=True)]
        found = results[name] = {
            "seconds": statistics.median(seconds),
            "tokens_per_second": statistics.median(rates),
            "ratio": statistics.median(ratios),
            "interval": [low, high],
        }
        print(
            f"| {name} | {found['seconds']:.2f} s | {found['tokens_per_second']:,.0f} | {found['ratio']:.2f} "
            f"({low:.2f} to {high:.2f}) |"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "device": device_name(), "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
