"""Metrics, judges and reports for aligned models: functions on plain arrays, and runners on models and datasets."""

import importlib
import warnings


# Public name -> module that defines it; imported on first use, so that the metrics on arrays load no model library.
_PUBLIC = {
    name: f".{module}" if module not in ("endpoint", "judges") else f"..judges.{module}"
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
        "endpoint": ("EndpointJudge",),
        "config": ("EvaluationConfig",),
        "data": ("tokenize_pairs",),
        "evaluate": ("evaluate_models",),
        "generation": ("Samples", "SamplingSettings", "sample_responses", "score_samples"),
        "intervals": ("Estimate", "accuracy_difference", "mcnemar", "mean", "paired_difference", "proportion"),
        "judges": (
            "Judge",
            "JudgeError",
            "Judgements",
            "RewardFunctionJudge",
            "RewardModelJudge",
            "judge_responses",
            "load_judge",
        ),
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
