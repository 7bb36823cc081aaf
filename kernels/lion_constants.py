"""Constants that the Triton kernel of Lion and its PyTorch form share; nothing here needs Triton."""

GROUP = 256  # elements of an 8-bit momentum that share a scale
LEVELS = 127  # of its magnitude, above 0

# multipliers of the hash that makes random bits, as signed 32-bit numbers
HASH_INDEX = 0x1E3779B1
HASH_FIRST = 0x7FEB352D
HASH_SECOND = -0x7B935975
