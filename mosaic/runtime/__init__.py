"""The ranks, and what runs on them: collectives, random numbers, what they tell each other."""
