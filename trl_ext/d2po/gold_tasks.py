"""
Gold functions that follow a rule: the synthetic tasks of the D2PO paper, and film sentiment.

Each is a reward function as [`~trl.GRPOTrainer`] takes it, `f(prompts, completions, **columns) -> list[float]`, on
texts or messages, and can be passed as `gold_labeller`. All but [`math_expansion`] score the completion alone.
"""

import ast
import operator
import random
import re
from functools import lru_cache
from typing import Any


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


# ---- Word collector -------------------------------------------------------------------------------------------------

# The words of the paper's code (`bagofwords`).
COLLECTED_WORDS = (
    "data hope information provide example your however first have help additionally important include finally "
    "following happy code two create question possible understand generate contains appropriate best respectful "
    "ensure experience safe"
).split()

# A word as NLTK's `word_tokenize` cuts it: compounds with hyphen, slash or underscore stay whole, a clitic ("data's")
# is cut off, and punctuation around it does not count.
_TOKENS = re.compile(r"[A-Za-z0-9_]+(?:[-/.&][A-Za-z0-9_]+)*")


def word_collector(prompts, completions, **columns) -> list[float]:
    """
    Number of 30 common words that occur in a completion, 0 to 30. Matching is case-sensitive and by whole tokens:
    "data," and "data's" match "data"; "Data", "database" and "data-driven" do not.
    """
    words = set(COLLECTED_WORDS)
    return [float(len(words & set(_TOKENS.findall(_text(completion))))) for completion in completions]


# ---- Unique nouns ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _tagger():
    try:
        from textblob.en.taggers import PatternTagger
    except ImportError as error:
        raise ImportError("The task of unique nouns needs a tagger: pip install 'trl-ext[tasks]'") from error
    return PatternTagger()


def unique_nouns(prompts, completions, **columns) -> list[float]:
    """
    Number of distinct nouns in a completion: tokens whose part of speech begins with NN, case-sensitive.

    The paper's code tags with NLTK's averaged perceptron, whose weights must be downloaded. This function uses the
    lexicon and the rules of `pattern`, which are part of the package `textblob`. Its numbers are close to the paper's
    but not equal.
    """
    tagger = _tagger()
    return [
        float(len({token for token, tag in tagger.tag(_text(completion)) if tag.startswith("NN")}))
        for completion in completions
    ]


# ---- Math expansion -------------------------------------------------------------------------------------------------

MATH_FAILURE = -200.0
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
_INNERMOST = re.compile(r"\([^()]*\)")


def evaluate_expression(expression: str) -> int:
    """
    Value of an expression of integers, +, -, * and parentheses, without `eval`.

    Raises:
        `ValueError`: For anything else (`**` in particular), more than 200 characters, or numbers above 10^12.
    """
    if len(expression) > 200:
        raise ValueError("The expression has more than 200 characters.")
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"The expression cannot be parsed: {expression!r}.") from error


def _evaluate(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluate(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    else:
        raise ValueError(f"The expression has a `{type(node).__name__}`. Only integers, +, -, * and () are allowed.")
    if abs(value) > 10**12:
        raise ValueError("The numbers grow too large.")
    return value


def expand_math(problem: str) -> list[str]:
    """
    The steps that solve an expression. Each step replaces the leftmost innermost parenthesis by its value; the last
    one evaluates the rest. `expand_math("(2+3)*(4-1)")` is `["5*(4-1)", "5*3", "15"]`.
    """
    expression, steps = problem.strip(), []
    while (match := _INNERMOST.search(expression)) is not None:
        value = evaluate_expression(match[0][1:-1])
        expression = f"{expression[: match.start()]}{value}{expression[match.end() :]}"
        steps.append(expression)
    result = str(evaluate_expression(expression))
    return steps if steps and steps[-1] == result else [*steps, result]


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of a character."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def math_expansion(prompts, completions, **columns) -> list[float]:
    """
    Minus the number of edits between a completion's steps and the right ones ([`expand_math`]), 0 at best.

    The prompt and the completion are read as one text. Characters other than digits, parentheses, `+`, `-`, `*`, `=`
    and space are dropped, and `=` separates the steps, of which the first is the problem. A missing step costs all its
    characters, a surplus step costs nothing, and a space inside a step is an edit. The score is -200 if the problem
    cannot be parsed.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = (prompt if isinstance(prompt, str) else prompt[-1]["content"]) + _text(completion)
        problem, *steps = (step.strip() for step in re.sub(r"[^0-9()+*\-= ]", "", text).split("="))
        try:
            expected = expand_math(problem)
        except ValueError:
            rewards.append(MATH_FAILURE)
            continue
        steps += [""] * (len(expected) - len(steps))
        rewards.append(-float(sum(edit_distance(s, e) for s, e in zip(steps, expected, strict=False))))
    return rewards


def math_problems(count: int, seed: int = 0) -> list[str]:
    """
    Prompts of the task: random binary trees of depth 1 or 2 over +, - and *, operands 1 to 9, with a result between
    -98 and 98, ending in " = ".
    """
    generator = random.Random(seed)

    def tree(depth: int) -> str:
        if depth == 0 or (depth == 1 and generator.random() < 0.3):
            return str(generator.randint(1, 9))
        return f"({tree(depth - 1)}{generator.choice('+-*')}{tree(depth - 1)})"

    problems: list[str] = []
    while len(problems) < count:
        problem = f"{tree(1)}{generator.choice('+-*')}{tree(1)}"
        if "(" in problem and abs(evaluate_expression(problem)) < 99:
            problems.append(f"{problem} = ")
    return problems


# ---- Film sentiment -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _sentiment_analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("The task of film sentiment needs VADER: pip install 'trl-ext[tasks]'") from error
    return SentimentIntensityAnalyzer()


def film_sentiment(prompts, completions, **columns) -> list[float]:
    """
    VADER's compound sentiment of a completion, from -1 to 1; 0 if it is empty. The recipes measure with it, too.
    """
    analyzer = _sentiment_analyzer()
    texts = (_text(completion) for completion in completions)
    return [float(analyzer.polarity_scores(text)["compound"]) if text.strip() else 0.0 for text in texts]


GOLD_TASKS = {
    "word_collector": word_collector,
    "unique_nouns": unique_nouns,
    "math_expansion": math_expansion,
    "film_sentiment": film_sentiment,
}
