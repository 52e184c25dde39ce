"""Metrics, judges and reports for aligned models: functions on plain arrays, and runners on models and datasets."""

import importlib
import warnings
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # what `__getattr__` gives, for type checkers and editors
    from ..judges.callables import Judge as Judge, RewardFunctionJudge as RewardFunctionJudge
    from ..judges.endpoint import EndpointJudge as EndpointJudge
    from ..judges.loading import load_judge as load_judge
    from ..judges.reward_models import RewardModelJudge as RewardModelJudge
    from ..judges.verdicts import JudgeError as JudgeError
    from .calibration import (
        Calibration as Calibration,
        expected_calibration_error as expected_calibration_error,
        preference_confidence as preference_confidence,
    )
    from .callbacks import (
        FrontierCallback as FrontierCallback,
        RankingAccuracyCallback as RankingAccuracyCallback,
        WinRateCallback as WinRateCallback,
    )
    from .config import EvaluationConfig as EvaluationConfig
    from .data import tokenize_pairs as tokenize_pairs
    from .divergences import (
        best_of_n as best_of_n,
        kl_estimates as kl_estimates,
        sampled_divergence as sampled_divergence,
        sequence_kl as sequence_kl,
        token_divergences as token_divergences,
    )
    from .diversity import (
        distinct_n as distinct_n,
        embed_texts as embed_texts,
        embedding_diversity as embedding_diversity,
        predictive_entropy as predictive_entropy,
        self_bleu as self_bleu,
    )
    from .evaluate import evaluate_models as evaluate_models
    from .generation import (
        Samples as Samples,
        SamplingSettings as SamplingSettings,
        sample_responses as sample_responses,
        score_samples as score_samples,
    )
    from .intervals import (
        Estimate as Estimate,
        accuracy_difference as accuracy_difference,
        mcnemar as mcnemar,
        mean as mean,
        paired_difference as paired_difference,
        proportion as proportion,
    )
    from .judging import Judgements as Judgements, judge_responses as judge_responses
    from .pass_rate_callback import PassAtKCallback as PassAtKCallback
    from .pass_rates import mean_pass_at_k as mean_pass_at_k, pass_at_k as pass_at_k
    from .precision import without_autocast as without_autocast
    from .ranking import (
        AlignmentGap as AlignmentGap,
        alignment_gap as alignment_gap,
        flip_loss as flip_loss,
        flipped as flipped,
        idealized_ranked_correctly as idealized_ranked_correctly,
        idealized_ranking_accuracy as idealized_ranking_accuracy,
        pair_difficulty as pair_difficulty,
        ranked_correctly as ranked_correctly,
        ranking_accuracy as ranking_accuracy,
        reward_accuracy as reward_accuracy,
        unflipped as unflipped,
    )
    from .report import render_report as render_report, write_report as write_report
    from .scoring import (
        PairScores as PairScores,
        ScoredResponses as ScoredResponses,
        score_pairs as score_pairs,
        score_responses as score_responses,
    )
    from .win_rates import (
        LengthControlledWinRate as LengthControlledWinRate,
        WinRate as WinRate,
        combine_orders as combine_orders,
        detectable_difference as detectable_difference,
        length_controlled_win_rate as length_controlled_win_rate,
        order_consistency as order_consistency,
        win_rate as win_rate,
    )


# Public name -> module that defines it; imported on first use, so that the metrics on arrays load no model library.
_PUBLIC = {
    name: f"..{module}" if module == "judges" else f".{module}"
    for module, names in {
        "calibration": ("Calibration", "expected_calibration_error", "preference_confidence"),
        "callbacks": ("FrontierCallback", "RankingAccuracyCallback", "WinRateCallback"),
        "divergences": (
            "best_of_n",
            "kl_estimates",
            "sampled_divergence",
            "sequence_kl",
            "token_divergences",
        ),
        "diversity": ("distinct_n", "embed_texts", "embedding_diversity", "predictive_entropy", "self_bleu"),
        "config": ("EvaluationConfig",),
        "data": ("tokenize_pairs",),
        "evaluate": ("evaluate_models",),
        "generation": ("Samples", "SamplingSettings", "sample_responses", "score_samples"),
        "intervals": ("Estimate", "accuracy_difference", "mcnemar", "mean", "paired_difference", "proportion"),
        "judges": (
            "EndpointJudge",
            "Judge",
            "JudgeError",
            "RewardFunctionJudge",
            "RewardModelJudge",
            "load_judge",
        ),
        "judging": ("Judgements", "judge_responses"),
        "pass_rate_callback": ("PassAtKCallback",),
        "pass_rates": ("mean_pass_at_k", "pass_at_k"),
        "precision": ("without_autocast",),
        "ranking": (
            "AlignmentGap",
            "alignment_gap",
            "flip_loss",
            "flipped",
            "idealized_ranked_correctly",
            "idealized_ranking_accuracy",
            "pair_difficulty",
            "ranked_correctly",
            "ranking_accuracy",
            "reward_accuracy",
            "unflipped",
        ),
        "report": ("render_report", "write_report"),
        "scoring": ("PairScores", "ScoredResponses", "score_pairs", "score_responses"),
        "win_rates": (
            "LengthControlledWinRate",
            "WinRate",
            "combine_orders",
            "detectable_difference",
            "length_controlled_win_rate",
            "order_consistency",
            "win_rate",
        ),
    }.items()
    for name in names
}

__all__ = sorted(_PUBLIC)


# Names of 0.1.0, kept for one release.
_RENAMED = {"ResponseScores": "ScoredResponses"}


def __getattr__(name: str):
    if name in _RENAMED:
        warnings.warn(
            f"`trl_ext.evaluation.{name}` is now `{_RENAMED[name]}`; the old name goes in the next release.",
            FutureWarning,
            stacklevel=2,
        )
        return __getattr__(_RENAMED[name])
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trl_ext.evaluation' has no attribute '{name}'. Names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_PUBLIC[name], __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
