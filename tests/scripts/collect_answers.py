"""Samples answers in one process or several, and writes what each process gets: collect_answers.py MODEL OUTPUT."""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conftest  # noqa: E402, F401 - sets the environment
import harness  # noqa: E402
import tiny  # noqa: E402
from accelerate import PartialState  # noqa: E402

from trl_ext.rollout.pass_rates import AnswerOptions, Answers  # noqa: E402


def reward(completions, **columns):
    return [float(len(completion)) for completion in completions]


def main(model: str, output: str):
    state = PartialState(cpu=True)
    dataset = tiny.dataset(40).select_columns(["prompt"])
    options = AnswerOptions(max_completion_length=4)
    answers = Answers(harness.load(model).eval(), tiny.tokenizer(), dataset, reward, options=options)
    groups = answers(range(40), range(2))
    found = [[(answer.row, answer.completion_ids, answer.reward) for answer in group] for group in groups]
    Path(f"{output}-{state.process_index}.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
