"""Evaluation scores both responses of a pair on one packed row, with the numbers of each side on its own."""

import numpy as np
import tiny

from trl_ext.evaluation import scoring
from trl_ext.evaluation.data import tokenize_pairs


def test_pairs_are_scored_with_their_prompt_once(monkeypatch):
    model, reference = tiny.model().eval(), tiny.model(seed=1).eval()
    options = dict(reference=reference, divergences=["forward_kl"], batch_size=4)
    packed, forward = [], scoring.packed_forward
    monkeypatch.setattr(scoring, "packed_forward", lambda rows: packed.append(rows) or forward(rows))
    scores = scoring.score_pairs(model, tiny.rows(9), tiny.tokenizer(), **options)
    # Five batches under two models, and the comparison of the first; all but the last odd pair's rows share prompts.
    assert len(packed) == 12 and all(len(rows.shared) for rows in packed)
    monkeypatch.setattr(scoring.SharedPrompts, "rows", lambda *arguments: None)
    pairs = tokenize_pairs(tiny.rows(9), tiny.tokenizer(), None)
    for side, found in (("chosen_ids", scores.chosen), ("rejected_ids", scores.rejected)):
        expected = scoring.score_responses(
            model, [pair["prompt_ids"] for pair in pairs], [pair[side] for pair in pairs], **options
        )
        assert (found.mask == expected.mask).all()
        for name in ("token_logps", "token_entropy", "ref_token_logps"):
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
        np.testing.assert_allclose(found.divergence("forward_kl"), expected.divergence("forward_kl"), atol=1e-5)
