"""
Does the entropy that Mallows-DPO takes for disagreement follow the disagreement of people?

Film-review sentences, each rated from -4 to 4 by many people, meet SmolLM2-135M-Instruct in two roles, and its entropy
is taken as `MallowsDPOTrainer` takes it: of the next-token distributions of a response, averaged over its tokens (EOS
included), divided by log V, and averaged over the two responses of a pair.

- written: the sentences are responses to one prompt that asks for them. People's disagreement is, of a sentence, the
  standard deviation of its ratings; of a pair of sentences, the split of the raters.
- judged: the sentence is in the prompt, and the responses are "positive" and "negative". People's disagreement is
  their split between ratings above and below 0.

A split is 1 - |2p - 1|, with p the probability that people prefer the one to the other (ties count half): 0 if all do
the same, 1 if they are evenly divided. It is what `dispersion_column` would hold.

Spearman's correlations with 95 % bootstrap intervals; partial ones (of ranks, by least squares) given what could feign
or hide a relation: length, how extreme the ratings are, and, for pairs, how far apart the two means lie. Ratings are
few, so no predictor can reach 1: the ceiling is the square root of the measure's split-half reliability
(Spearman-Brown).

    python recipes/experiments/mallows_dispersion.py --data movie_review_snippets.jsonl.gz

The data is JSONL (gzipped or not) with `text` and `ratings`, a list of numbers. Writes `mallows_dispersion.json` and
`.png` into `--output_dir`.
"""

import argparse
import gzip
import json
import random
import sys
import time
from pathlib import Path

import numpy as np


HERE = Path(__file__).resolve().parent
WRITTEN = "A sentence from a film review:"
JUDGED = "Film review: {text}\nQuestion: Is this review positive or negative?\nAnswer:"
ANSWERS = (" positive", " negative")
RESAMPLES = 2000


def parse_args(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="JSONL with `text` and `ratings`")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--sentences", type=int, default=1000, help="size of the random sample")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="seed of sample, pairs, halves and resampling")
    parser.add_argument("--output_dir", default=str(HERE))
    return parser.parse_args(arguments)


# ---- Measuring ------------------------------------------------------------------------------------------------------


def load_sample(path: str, count: int, seed: int) -> list[dict]:
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    return random.Random(seed).sample(rows, min(count, len(rows)) // 2 * 2)


class Reference:
    """A language model that is asked how uncertain it is of given responses."""

    def __init__(self, name: str, batch_size: int):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        self.batch_size = batch_size

    def score(self, prompts: list[str], responses: list[str]) -> dict[str, np.ndarray]:
        """Normalized entropy, mean negative log-probability and number of tokens of each response to its prompt."""
        import torch

        head = self.model.get_output_embeddings()
        # Tokenized together, as the trainer does, so that the boundary falls where it does in training.
        starts = [len(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        ids = [
            self.tokenizer(prompt + response + self.tokenizer.eos_token)["input_ids"]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        out = {name: np.zeros(len(ids)) for name in ("entropy", "surprisal", "tokens")}
        order, begun = sorted(range(len(ids)), key=lambda i: len(ids[i])), time.time()
        for begin in range(0, len(order), self.batch_size):
            batch = order[begin : begin + self.batch_size]
            longest = max(len(ids[i]) for i in batch)
            tokens = torch.tensor([ids[i] + [0] * (longest - len(ids[i])) for i in batch])
            position = torch.arange(longest)
            attention = position < torch.tensor([[len(ids[i])] for i in batch])
            mask = (attention & (position >= torch.tensor([[starts[i]] for i in batch])))[:, 1:]
            with torch.no_grad():
                hidden = self.model.base_model(input_ids=tokens, attention_mask=attention.long(), use_cache=False)[0]
                logprobs = head(hidden[:, :-1][mask]).log_softmax(-1)
            entropy = -(logprobs.exp() * logprobs).sum(-1) / np.log(head.weight.shape[0])
            surprisal = -logprobs.gather(-1, tokens[:, 1:][mask][:, None]).squeeze(-1)
            count = mask.sum(1)
            for name, values in (("entropy", entropy), ("surprisal", surprisal)):
                sums = torch.zeros(mask.shape).masked_scatter(mask, values).sum(1)
                out[name][batch] = (sums / count).double().numpy()
            out["tokens"][batch] = count.numpy()
            if begin // self.batch_size % 20 == 0:
                print(f"  {begin + len(batch)} of {len(ids)} responses, {time.time() - begun:.0f} s", flush=True)
        return out


def split(first, second=(0.0,)) -> float:
    """1 - |2p - 1|, p the probability that a rating of `first` is above one of `second`, which by default is 0."""
    difference = np.sign(np.subtract.outer(np.asarray(first, float), np.asarray(second, float)))
    return float(1 - abs(difference.mean()))


# ---- Statistics -----------------------------------------------------------------------------------------------------


def ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(values)


def spearman(x: np.ndarray, y: np.ndarray, given: tuple[np.ndarray, ...] = ()) -> float:
    """Spearman's correlation of x and y, with the ranks of `given` regressed out of both."""
    design = np.column_stack([np.ones(len(x)), *(ranks(value) for value in given)])
    residuals = []
    for value in (x, y):
        value = ranks(value)
        residuals.append(value - design @ np.linalg.lstsq(design, value, rcond=None)[0])
    return float(np.corrcoef(*residuals)[0, 1])


def with_interval(statistic, columns: list[np.ndarray], seed: int) -> dict:
    """The statistic and its 95 % percentile bootstrap interval, rows resampled together."""
    generator = np.random.default_rng(seed)
    count = len(columns[0])
    resampled = []
    for _ in range(RESAMPLES):
        rows = generator.integers(count, size=count)
        resampled.append(statistic(*(column[rows] for column in columns)))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"value": round(statistic(*columns), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def correlation(x, y, given=(), seed: int = 0) -> dict:
    return with_interval(lambda a, b, *g: spearman(a, b, g), [x, y, *given], seed)


def ceiling(measure, groups: list, seed: int, splits: int = 50) -> float:
    """
    Square root of the split-half reliability of `measure`: the highest correlation with it that is to be expected.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        halves = ([], [])
        for group in groups:
            parts = []
            for ratings in group:
                shuffled = generator.permutation(ratings)
                middle = len(shuffled) // 2
                parts.append((shuffled[:middle], shuffled[middle:]))
            for half, values in enumerate(halves):
                values.append(measure(*(part[half] for part in parts)))
        found.append(spearman(np.array(halves[0]), np.array(halves[1])))
    half = max(float(np.mean(found)), 0.0)
    return round(float(np.sqrt(2 * half / (1 + half))), 4)


def analyze(rows: list[dict], written: dict, judged: np.ndarray, seed: int) -> tuple[list[dict], dict]:
    """
    The three comparisons, each with its correlations, its ceiling and the columns behind them, and further numbers.

    Args:
        rows: Sentences with their ratings; consecutive ones make a pair.
        written: Scores of the sentences as responses.
        judged: Entropy of the answers to a question about each sentence.
        seed: Seed of halves and resampling.
    """
    ratings = [row["ratings"] for row in rows]
    mean = np.array([np.mean(values) for values in ratings])
    entropy, surprisal, tokens = (written[name] for name in ("entropy", "surprisal", "tokens"))

    def comparison(name, human, x, groups, measure, **columns):
        y = np.array([measure(*group) for group in groups])
        found = {key: correlation(column, y, given, seed) for key, (column, *given) in columns.items()}
        return {
            "name": name,
            "human": human,
            "count": len(y),
            "ceiling": ceiling(measure, groups, seed),
            "correlations": {
                key.replace("_", " ").replace(" given ", ", given "): value for key, value in found.items()
            },
            "columns": (x, y),
        }

    singles = [(values,) for values in ratings]
    sentences = comparison(
        "sentences, written",
        "standard deviation of the ratings",
        entropy,
        singles,
        np.std,
        entropy=(entropy,),
        entropy_given_length=(entropy, tokens),
        entropy_given_length_and_extremity=(entropy, tokens, abs(mean)),
        surprisal=(surprisal,),
        length=(tokens,),
        extremity=(abs(mean),),
    )
    first, second = slice(0, None, 2), slice(1, None, 2)
    pair_entropy, pair_tokens = (entropy[first] + entropy[second]) / 2, tokens[first] + tokens[second]
    apart = abs(mean[first] - mean[second])
    pairs = comparison(
        "pairs, written",
        "split of the raters, one or the other",
        pair_entropy,
        list(zip(ratings[first], ratings[second], strict=True)),
        split,
        entropy=(pair_entropy,),
        entropy_given_length=(pair_entropy, pair_tokens),
        entropy_given_length_and_distance=(pair_entropy, pair_tokens, apart),
        length=(pair_tokens,),
        distance=(apart,),
    )
    answers = comparison(
        "sentences, judged",
        "split of the raters, positive or negative",
        judged,
        singles,
        split,
        entropy=(judged,),
        entropy_given_length=(judged, tokens),
        entropy_given_length_and_extremity=(judged, tokens, abs(mean)),
        length=(tokens,),
        extremity=(abs(mean),),
    )
    further = {"entropy and length": {"written": correlation(entropy, tokens, seed=seed)}}
    further["entropy and length"]["judged"] = correlation(judged, tokens, seed=seed)
    for name, values in (("written", pair_entropy), ("judged", judged)):
        weights = np.log(values) / np.log(values).mean()  # as with kappa="auto"
        further[f"dispersion of a pair, {name}"] = {
            "percentiles 5, 50, 95": [round(float(p), 4) for p in np.percentile(values, [5, 50, 95])],
            "kappa": round(float(-1 / np.log(values).mean()), 4),
            "weights, percentiles 5, 50, 95": [round(float(p), 4) for p in np.percentile(weights, [5, 50, 95])],
        }
    return [sentences, pairs, answers], further


# ---- Showing --------------------------------------------------------------------------------------------------------


def plot(path: Path, comparisons: list[dict], model: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors, gray = ("#3b6fb6", "#d9822b", "#4c9a5f"), "#8a8a8a"
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    plt.rcParams.update({"axes.titlesize": 9, "axes.titleweight": "bold", "axes.grid": True, "grid.alpha": 0.25})
    figure = plt.figure(figsize=(12, 7.6), dpi=90, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 0.95])  # each with its own margins
    axes, forest = top.subplots(1, 3), bottom.subplots()
    for axis, part, color in zip(axes, comparisons, colors, strict=True):
        x, y = part["columns"]
        axis.scatter(x, y, s=7, color=gray, alpha=0.3, linewidths=0)
        edges = np.quantile(x, np.linspace(0, 1, 11))
        tenth = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, 9)
        groups = [tenth == i for i in range(10) if (tenth == i).any()]
        centers, means = ([values[group].mean() for group in groups] for values in (x, y))
        errors = [1.96 * y[group].std() / np.sqrt(group.sum()) for group in groups]
        axis.errorbar(
            centers, means, errors, color=color, marker="o", ms=4, lw=1.3, capsize=2, label="mean of a tenth"
        )
        found = part["correlations"]["entropy"]
        axis.set_title(
            f"{part['count']} {part['name']}\nρ = {found['value']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
        )
        axis.set(xlabel="normalized entropy of the model", ylabel=part["human"])
    axes[0].legend(frameon=False, loc="upper right")

    lines = [
        (label, value, color)
        for part, color in zip(comparisons, colors, strict=True)
        for label, value in part["correlations"].items()
    ]
    lines.reverse()
    for height, (_, value, color) in enumerate(lines):
        forest.plot([value["low"], value["high"]], [height, height], color=color, lw=2)
        forest.plot(value["value"], height, "o", color=color, ms=5)
    for part, color in zip(comparisons, colors, strict=True):
        forest.plot([], [], "o-", color=color, ms=5, label=part["name"])
    forest.axvline(0, color=gray, lw=0.8, ls="--")
    forest.set_yticks(range(len(lines)), [label for label, _, _ in lines], fontsize=8)
    forest.set(xlabel="Spearman's ρ with people's disagreement, 95 % interval", xlim=(-1, 1))
    forest.legend(frameon=False, loc="lower right")
    figure.suptitle(f"Entropy of {model.split('/')[-1]} and disagreement of people about film-review sentences")
    figure.savefig(path)
    plt.close(figure)


def main(arguments=None) -> None:
    options = parse_args(arguments)
    sys.path.insert(0, str(HERE.parent))
    from quickstart_model import BASE_MODEL, quickstart_model

    rows = load_sample(options.data, options.sentences, options.seed)
    texts, start = [row["text"] for row in rows], time.process_time()
    model = quickstart_model() if options.model == BASE_MODEL else options.model
    reference = Reference(model, options.batch_size)
    print(f"{len(rows)} sentences as responses", flush=True)
    written = reference.score([WRITTEN] * len(texts), [f" {text}" for text in texts])
    print("Answers about them", flush=True)
    questions = [JUDGED.format(text=text) for text in texts]
    judged = np.mean([reference.score(questions, [answer] * len(texts))["entropy"] for answer in ANSWERS], axis=0)
    print(f"Scored in {(time.process_time() - start) / 60:.1f} CPU-minutes; resampling", flush=True)
    comparisons, further = analyze(rows, written, judged, options.seed)
    numbers = {
        "model": options.model,
        "written": WRITTEN,
        "judged": JUDGED,
        "seed": options.seed,
        "resamples": RESAMPLES,
    }
    numbers["comparisons"] = [{key: value for key, value in part.items() if key != "columns"} for part in comparisons]
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**numbers, **further}, indent=2)
    (output_dir / "mallows_dispersion.json").write_text(text + "\n", encoding="utf-8")
    plot(output_dir / "mallows_dispersion.png", comparisons, options.model)
    print(text)


if __name__ == "__main__":
    main()
