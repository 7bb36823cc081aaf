#!/usr/bin/env bash
# pytorch-metric-learning 2.9.0: SupConLoss averages over the rows that have a positive, the paper's code over all rows.
#
# A row without another row of its class has a loss of 0 in both. The reference code of the paper (SupContrast) divides the sum by the number of
# rows. SupConLoss has the default reducer AvgNonZeroReducer, which divides by the number of rows whose loss is above 0. So the same batch has a larger loss
# and a larger gradient, by a factor that changes from batch to batch: 3 here, where two rows of six have a partner. With the reducer
# MeanReducer the values agree.
#
# Seen with pytorch-metric-learning 2.9.0 (temperature 0.1, unit rows):
#     SupConLoss 7.3995, mean over all rows 2.4665, mean over rows with a positive 7.3995, with MeanReducer 2.4665
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 pytorch-metric-learning==2.9.0 numpy
cat >"$folder/finding.py" <<'PYTHON'
import torch
from pytorch_metric_learning.losses import SupConLoss
from pytorch_metric_learning.reducers import MeanReducer

torch.manual_seed(0)
rows = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
labels = torch.tensor([0, 0, 1, 2, 3, 4])
theirs, with_mean = SupConLoss(0.1)(rows, labels), SupConLoss(0.1, reducer=MeanReducer())(rows, labels)

scores = rows @ rows.T / 0.1
others = ~torch.eye(6, dtype=torch.bool)
log_shares = scores - (scores.exp() * others).sum(1, keepdim=True).log()
positives = (labels[:, None] == labels) & others
losses = -(log_shares * positives).sum(1) / positives.sum(1).clamp(min=1)
lone = positives.sum(1) == 0
print(
    f"SupConLoss {theirs:.4f}, mean over all rows {losses.mean():.4f}, mean over rows with a positive {losses[~lone].mean():.4f}, "
    f"with MeanReducer {with_mean:.4f}"
)
assert torch.allclose(theirs, losses[~lone].mean()) and torch.allclose(with_mean, losses.mean()), "the behaviour has changed"
assert theirs > 2.9 * losses.mean(), "the behaviour has changed"
PYTHON
cd "$folder"
venv/bin/python finding.py
