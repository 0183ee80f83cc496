"""What a sparse model can still do: recall over the context, and loss on held text."""

from sparse_hf_training.evaluation.judge import Judge, Judgement
from sparse_hf_training.evaluation.kv_bytes import measure_kv_bytes
from sparse_hf_training.evaluation.recall import RecallResult, evaluate_recall
from sparse_hf_training.evaluation.text_loss import evaluate_text_loss

__all__ = ["Judge", "Judgement", "RecallResult", "evaluate_recall", "evaluate_text_loss", "measure_kv_bytes"]
