"""
Trains a method with completions from vLLM inside this process, and writes what vLLM said beside what the policy says:

    sample_with_vllm.py <d2po or a method id of sampling.py> <model folder> <output folder>

`result.json` holds, before and after training: greedy completions of vLLM and of Transformers, log-probabilities that
vLLM gave for completions sampled at temperature 1, and those of one plain forward over the same tokens.
"""

import functools
import json
import sys
from pathlib import Path


TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "d2po")]

import conftest  # noqa: E402, F401 - sets the environment
import online  # noqa: E402
import sampling  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402

from trl_ext.training.modes import evaluation_mode  # noqa: E402


def prepare_vllm() -> None:
    """Replaces vLLM's packing of linear layers, the check that refuses the CPU build for it, and vLLM's precision."""
    from trl.generation import vllm_generation
    from vllm import LLM
    from vllm.model_executor.layers import utils

    from trl_ext.training import vllm

    def plain(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain
    vllm.packs_weights = lambda: False
    vllm_generation.LLM = functools.partial(LLM, dtype="float32")


PROMPTS = ["The film begins", "I went to see it because", "Two hours later", "What I liked was"]
LENGTH = 12


def build(method: str, model: str, folder: Path):
    options = {
        "use_vllm": True, "vllm_mode": "colocate", "learning_rate": 2e-3, "max_steps": 2, "num_train_epochs": 1,
        "max_completion_length": LENGTH, "per_device_train_batch_size": 8, "report_to": "none",
    }  # fmt: skip
    data = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 4])
    if method == "d2po":
        return online.trainer(model, folder, labeller=online.CountedLabeller(), train_dataset=data, **options)
    return sampling.trainer(
        sampling.BY_ID[method], model, folder, train_dataset=data, peft_config=online.lora(), **options
    )


def plain_logprobs(trainer, completions) -> list[list[float]]:
    """Log-probabilities of the tokens of each prompt's completion under the policy, without any machinery."""
    model, found = trainer.accelerator.unwrap_model(trainer.model), []
    with evaluation_mode(model), torch.no_grad():
        for prompt, ids in zip(PROMPTS, completions, strict=True):
            row = trainer.processing_class(prompt)["input_ids"]
            logits = model(input_ids=torch.tensor([row + list(ids)], device=model.device)).logits[0, len(row) - 1 : -1]
            found.append(logits.float().log_softmax(-1)[range(len(ids)), list(ids)].tolist())
    return found


def look(trainer, engine) -> dict:
    """What vLLM, with the policy's weights just sent, and the policy itself make of the prompts."""
    tokenizer, model = trainer.processing_class, trainer.accelerator.unwrap_model(trainer.model)
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    engine.sync_weights()
    kept = engine.temperature, engine.logprobs, engine.generation_kwargs
    engine.logprobs = 0
    engine.temperature = 0.0
    greedy = [list(ids) for ids in engine.generate(prompts=rows, images=None, num_generations=1)[1]]
    engine.temperature = 1.0
    engine.generation_kwargs = {"seed": 7}
    _, sampled, logprobs, _ = engine.generate(prompts=rows, images=None, num_generations=1)
    again = engine.generate(prompts=rows, images=None, num_generations=1)[1]
    stop = tokenizer.decode(greedy[0][2:3])
    engine.temperature, stopped = 0.0, []
    for ending in ({"stop": [stop]}, {"stop_token_ids": [greedy[0][2]]}):
        engine.generation_kwargs = ending
        stopped.append(len(engine.generate(prompts=rows[:1], images=None, num_generations=1)[1][0]))
    engine.temperature, engine.logprobs, engine.generation_kwargs = kept

    own_greedy = []
    with evaluation_mode(model), torch.no_grad():
        for row in rows:
            inputs = torch.tensor([row], device=model.device)
            output = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=LENGTH
            )
            own_greedy.append(output[0, len(row) :].tolist())
    return {
        "greedy": greedy,
        "own_greedy": own_greedy,
        "logprobs": [[token[0] for token in row] for row in logprobs],
        "own_logprobs": plain_logprobs(trainer, sampled),
        "sampled": [list(ids) for ids in sampled],
        "sampled_again": [list(ids) for ids in again],
        "stopped": stopped,
    }


def main(method: str, model: str, folder: str):
    prepare_vllm()
    trainer = build(method, model, Path(folder))
    engine = trainer.sampler.vllm if method == "d2po" else trainer.vllm_generation
    before = look(trainer, engine)
    trainer.train()
    after = look(trainer, engine)
    moved = plain_logprobs(trainer, before["sampled"])
    result = {
        "before": before,
        "after": after,
        "moved": moved,
        "steps": trainer.state.global_step,
        "logs": trainer.state.log_history,
    }
    Path(folder, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
