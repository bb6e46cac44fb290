"""Steps in which lesion probability travels between workers."""

# Probability is stored as uint8 in these steps, so that 127 is one half.
PROBABILITY_STEPS = 254
