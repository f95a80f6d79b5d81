"""What the YAML files call. lm-eval loads this file by its path."""

import importlib
from typing import Any

from everlong.evaluation.asking import is_exact
from everlong.evaluation.codec import Codec
from everlong.evaluation.lm_eval import items


def documents(everlong_task: str, **metadata: Any) -> dict[str, Any]:
    """The test split of a task; of the metadata, keys that are not ours are those of the model."""
    datasets: Any = importlib.import_module("datasets")  # comes with lm-eval
    asked = {key: metadata[key] for key in ("lengths", "samples", "seed") if key in metadata}
    tokenizer = metadata.get("tokenizer") or metadata.get("pretrained")
    if isinstance(tokenizer, str):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return {
        "test": datasets.Dataset.from_list(items(everlong_task, count=_counter(tokenizer), **asked))
    }


def _counter(tokenizer: Any) -> Any:
    return Codec(tokenizer if hasattr(tokenizer, "encode") else None).counter()


def exact_match(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Over all, and under a name of its own for the document's length: a length without documents
    is in no result."""
    return _at_length("exact_match", float(is_exact(results[0], document["answers"])), document)


def accuracy(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether the answer is likelier than every other candidate; as above."""
    nats = [log_likelihood for log_likelihood, _ in results]
    right = nats.pop(document["label"])
    return _at_length("acc", float(right > max(nats)), document)


def _at_length(metric: str, value: float, document: dict[str, Any]) -> dict[str, float]:
    return {metric: value, f"{metric}@{document['length']}": value}
