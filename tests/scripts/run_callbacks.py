"""
Trains f-DPO with the evaluation callbacks and writes what they found; started by `accelerate launch`.

    run_callbacks.py <model folder> <output folder> <batch size of a process> [fsdp2]
"""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401 - sets the environment
import engines  # noqa: E402
import harness  # noqa: E402
import tiny  # noqa: E402
from methods import BY_ID  # noqa: E402

from trl_ext.evaluation import (  # noqa: E402
    FrontierCallback,
    JudgeError,
    RankingAccuracyCallback,
    RewardFunctionJudge,
    SamplingSettings,
    WinRateCallback,
)


def length(prompts, completions):
    return [float(len(completion)) for completion in completions]


def busy(prompts, completions):
    """Fails for one prompt, so in one process alone where there are two."""
    if any("number 2?" in prompt for prompt in prompts):
        raise JudgeError("HTTP 503")
    return length(prompts, completions)


def main(model: str, output: Path, batch_size: int, engine: str = "none") -> None:
    engines.start(engine)
    trainer = harness.trainer(
        BY_ID["fdpo"],
        model,
        output,
        eval_dataset=tiny.dataset(12, seed=7),
        eval_strategy="steps",
        eval_steps=2,
        max_steps=3,  # trained on after the measurement
        per_device_train_batch_size=batch_size,
        **engines.arguments_of(engine, ["Qwen2DecoderLayer"]),
    )
    greedy, sampled = SamplingSettings(5, temperature=0.0), SamplingSettings(5)
    callbacks = [
        RankingAccuracyCallback(trainer),
        # One at a time: a process that has a prompt more samples once more.
        WinRateCallback(
            RewardFunctionJudge(length), trainer, opponent="chosen", num_prompts=7, settings=greedy, batch_size=1
        ),
        FrontierCallback(length, trainer, num_prompts=7, settings=sampled),
        WinRateCallback(RewardFunctionJudge(busy), trainer, opponent="chosen", num_prompts=7, settings=greedy),
    ]
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    sharded = [engines.is_sharded(p) for model in (trainer.model, trainer.ref_model) for p in model.parameters()]
    assert set(sharded) == {engine == "fsdp2"}
    found = [callback.history for callback in callbacks]
    (output / f"process_{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
    trainer.end()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
