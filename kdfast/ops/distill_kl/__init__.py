"""Logit distillation: the operator, its PyTorch form, and the form fused with the last linear layer."""
