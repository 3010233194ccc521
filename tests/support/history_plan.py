"""What requests of random histories may ask for."""

from typing import Final

from router.request import SamplingParams

LONGEST_ANSWER: Final = 24
SAMPLED = SamplingParams(max_tokens=LONGEST_ANSWER, temperature=0.8, top_p=0.95, seed=11, repetition_penalty=1.1)
GREEDY = SamplingParams(max_tokens=LONGEST_ANSWER, temperature=0.0)
LEASE_S: Final = 5.0
