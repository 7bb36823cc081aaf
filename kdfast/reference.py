"""What each operator means, in plain PyTorch that works in any floating dtype: the oracle of the tests.

Every function follows its paper line by line and is differentiated by autograd. None is clever, none checks its input
(kdfast/ops does), and none is fast on purpose. N rows, C classes, D features, T temperature, tau contrastive temperature.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- logit distillation ----------------------------------------------------------------------------------------------


# ---- supervised contrastive loss -------------------------------------------------------------------------------------


# ---- attention transfer, hints, self-distillation --------------------------------------------------------------------


# ---- Lion ------------------------------------------------------------------------------------------------------------
