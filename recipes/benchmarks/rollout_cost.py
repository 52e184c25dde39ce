"""
Time of a training step of each method that samples, beside TRL's trainer that it descends from, on the same prompts.

All trainers live in one process and take turns; the ratio of a method is the median over rounds of its time over its
parent's in the same round, with its 95 % bootstrap interval. A step is measured whole (sampling, rewards, forward and
backward, optimizer) and without sampling, since sampling costs all of them the same. The methods over RLOO have its KL
to the reference, so both compute the reference's log-probabilities.

The model has random weights, so nothing is downloaded, and hardly an answer in a hundred ends before
`--completion_length`: all batches are of one shape.

    python recipes/benchmarks/rollout_cost.py --rounds 10
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
import warnings


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--completions", type=int, default=16, help="completions of a step")
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--prompt_length", type=int, default=32)
    parser.add_argument("--completion_length", type=int, default=64)
    parser.add_argument("--anchors", type=int, default=4, help="anchors of a prompt, for WRO")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--methods", nargs="+", help="names printed by a run without this option")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that other processes use too"
    )
    parser.add_argument("--json", help="also write the results to this file")
    return parser.parse_args()


def methods() -> dict:
    """Name -> trainer, its configuration, options, further arguments by name, and the name of its parent."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from trl_ext import DPHRLConfig, DPHRLTrainer, FDPGConfig, FDPGTrainer, WROConfig, WROTrainer

    rehearsal = {"rehearsal_dataset": "rehearsal"}
    kl = {"beta": 0.1}
    return {
        "GRPO": (GRPOTrainer, GRPOConfig, {}, {}, None),
        "DPH-RL, coefficient 0": (DPHRLTrainer, DPHRLConfig, {"rehearsal_coef": 0.0}, {}, "GRPO"),
        "DPH-RL": (DPHRLTrainer, DPHRLConfig, {}, rehearsal, "GRPO"),
        "DPH-RL, JS": (DPHRLTrainer, DPHRLConfig, {"divergence": "js"}, rehearsal, "GRPO"),
        "RLOO": (RLOOTrainer, RLOOConfig, kl, {}, None),
        "f-DPG, JS": (FDPGTrainer, FDPGConfig, {**kl, "divergence": "js"}, {}, "RLOO"),
        "f-DPG, forward KL": (FDPGTrainer, FDPGConfig, {**kl, "divergence": "forward_kl"}, {}, "RLOO"),
        "WRO": (WROTrainer, WROConfig, kl, {"reward_funcs": "none", "judge": "judge"}, "RLOO"),
    }


def distinct_words(text: str) -> int:
    return len(set(text.split()))


def judge(prompts, first, second, **columns) -> list[float]:
    """The completion with more distinct words wins; nearly free, like a rule."""
    pairs = [(distinct_words(a), distinct_words(b)) for a, b in zip(first, second, strict=True)]
    return [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in pairs]


def build(name: str, spec: tuple, options, folder: str):
    """A trainer of a method, with its model, prompts, answers and anchors."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = ["<end>", *(f"w{i}" for i in range(options.vocabulary - 1))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", padding_side="left"
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden_size,
            intermediate_size=4 * options.hidden_size,
            num_hidden_layers=options.layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            eos_token_id=None,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    # In a folder: TRL loads a reference by name.
    base = os.path.join(folder, "base")
    model.save_pretrained(base)
    generator = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{generator.randrange(options.vocabulary - 1)}" for _ in range(length))

    prompts = Dataset.from_dict({"prompt": [text(options.prompt_length) for _ in range(64)]})
    answers = Dataset.from_list(
        [
            {
                "prompt_ids": fast(text(options.prompt_length))["input_ids"],
                "completion_ids": fast(text(options.completion_length))["input_ids"],
            }
            for _ in range(32)
        ]
    )
    anchors = [[text(options.completion_length) for _ in range(options.anchors)] for _ in prompts]
    prompts = prompts.add_column("anchors", anchors)
    trainer_class, config_class, own, arguments, _ = spec
    arguments = {"reward_funcs": "reward", **arguments}
    values = {
        "reward": lambda completions, **columns: [float(distinct_words(text)) for text in completions],
        "none": [],
        "judge": judge,
        "rehearsal": answers,
    }
    args = config_class(
        os.path.join(folder, name.replace(" ", "_")),
        per_device_train_batch_size=options.completions,
        num_generations=options.num_generations,
        max_completion_length=options.completion_length,
        max_steps=10_000,
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        logging_steps=10_000,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **own,
    )
    return trainer_class(
        model=base,
        args=args,
        train_dataset=prompts,
        processing_class=fast,
        **{key: values[value] for key, value in arguments.items()},
    )


class Stepper:
    """
    Runs the training of a trainer one step at a time, in a thread of its own that waits between steps; `clock` is read
    before and after.
    """

    def __init__(self, trainer, clock):
        import threading

        from transformers import TrainerCallback

        self.trainer, self.times, self.sampling = trainer, [], 0.0
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        stepper = self

        class Turns(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                stepper._go.acquire()
                stepper.start, stepper.sampling = clock(), 0.0
                control.should_training_stop = stepper.ends

            def on_step_end(self, args, state, control, **kwargs):
                whole = clock() - stepper.start
                stepper.times.append((whole, whole - stepper.sampling))
                stepper._done.release()

        original = trainer._generate_single_turn

        def timed(*args, **kwargs):
            start = clock()
            result = original(*args, **kwargs)
            stepper.sampling += clock() - start
            return result

        trainer._generate_single_turn = timed
        trainer.add_callback(Turns())
        self.ends, self.failure = False, None
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self.failure = error
            self._done.release()

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and of it without sampling."""
        self._go.release()
        self._done.acquire()
        if self.failure is not None:
            raise self.failure
        return self.times[-1]


def main():
    options = parse_args()
    import torch
    from step_cost import interval

    if options.threads:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    chosen = {name: spec for name, spec in methods().items() if not options.methods or name in options.methods}
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        # All are built before one of them trains: each configuration resets Accelerate's state of the process.
        trainers = {name: build(name, spec, options, folder) for name, spec in chosen.items()}
        steppers = {name: Stepper(trainer, clock) for name, trainer in trainers.items()}
        for stepper in steppers.values():
            stepper.step()  # the first also computes what comes before training
        names, rounds = list(steppers), []
        for number in range(options.rounds):
            # The order changes from round to round, so that no method always follows the same one.
            order = names[number % len(names) :] + names[: number % len(names)]
            rounds.append({name: steppers[name].step() for name in order})
    results = {}
    for name, spec in chosen.items():
        parent = spec[4] or name
        entry = {"seconds": statistics.median(r[name][0] for r in rounds)}
        for key, part in (("ratio", 0), ("ratio without sampling", 1)):
            ratios = [r[name][part] / r[parent][part] for r in rounds]
            entry[key] = [statistics.median(ratios), *interval(ratios)]
        results[name] = entry
        shown = ", ".join(
            f"{key} {entry[key][0]:.2f} [{entry[key][1]:.2f}, {entry[key][2]:.2f}]"
            for key in ("ratio", "ratio without sampling")
        )
        print(f"{name}: {entry['seconds']:.2f} s a step, {shown}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"settings": vars(options), "results": results}, file, indent=1)
    os._exit(0)  # the trainings wait for steps that will not come


if __name__ == "__main__":
    main()
