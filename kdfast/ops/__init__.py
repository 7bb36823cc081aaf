"""One file an operator: input checks, choice of backend, autograd, registration with torch.library."""
