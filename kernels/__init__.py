"""Triton kernels, one file an operator, installed as kdfast.kernels. Tensors in, tensors out; nothing here imports the rest of kdfast."""
