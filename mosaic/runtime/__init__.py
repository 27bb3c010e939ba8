"""What runs on ranks: collectives, random numbers, and what ranks tell each other."""
