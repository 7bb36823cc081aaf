"""Loss modules: drop-in replacements for the papers' own classes, with their signatures, defaults and values.

State-free unless the method has state (SelfDistillationLoss has a 1x1 convolution, HintLoss a regressor).
"""

# ---- logit distillation ----------------------------------------------------------------------------------------------


# ---- supervised contrastive loss, ConKD ------------------------------------------------------------------------------


# ---- attention transfer, hints, self-distillation --------------------------------------------------------------------
