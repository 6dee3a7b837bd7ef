"""The marginal likelihood while a network trains: online tuning, and bounds from minibatches."""

from bayesdl.marginal.bounds import MinibatchEvidence
from bayesdl.marginal.online import EvidenceFit, EvidenceTrainer, evidence_training

__all__ = ["EvidenceFit", "EvidenceTrainer", "MinibatchEvidence", "evidence_training"]
