"""The measures of the published tables of WikiText-103, PG-19 and enwik8."""

from typing import Any

from everlong.errors import UserError
from everlong.evaluation.texts import TextScore, count_lines, perplexity
from everlong.tasks.standard import ENWIK8_BYTES, STANDARDS
from everlong.tasks.text import Documents

_NEAR = 0.02  # a count as near as this to a published one is that split's


def published_score(name: str, documents: Documents, score: TextScore) -> dict[str, Any]:
    """What `score`, of all `documents` of a standard corpus, is in its published measure.

    Words are divided by the published count of the split where theirs, counted here, is nearest to
    it and within 2 %; else by those counted, and the row says which.
    """
    standard = STANDARDS[name]
    if standard.unit == "character":
        whole = score.num_bytes * 20 == ENWIK8_BYTES
        return {
            "published_measure": "bits per character",
            "published_value": score.bits_per_byte,
            "published_units": score.num_bytes,
            "published_count": "bytes" if whole else "bytes (not the 5,000,000 of the whole file)",
        }
    if score.words is None:
        raise UserError(f"{documents.source} is not UTF-8 text: {name} has words")
    counted = score.words + (count_lines(documents) if standard.ends else 0)
    split, units = min(standard.published, key=lambda each: abs(each[1] - counted))
    known = abs(units - counted) <= _NEAR * units
    units = units if known else counted
    return {
        "published_measure": "word perplexity",
        "published_value": perplexity(score.nats, units),
        "published_units": units,
        "published_count": f"words (published, {split})" if known else "words (counted here)",
    }
