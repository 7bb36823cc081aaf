"""Functional forms of the losses: stateless, differentiable, one call each.

Shapes: N rows, C classes, B samples, V views, D features. Arithmetic is float32 for float32, bfloat16 and float16
inputs, and float64 for float64. Every function raises ValueError or TypeError in one sentence that names the argument.
"""

# ---- logit distillation ----------------------------------------------------------------------------------------------


# ---- supervised contrastive loss -------------------------------------------------------------------------------------


# ---- attention transfer, hints, self-distillation --------------------------------------------------------------------
