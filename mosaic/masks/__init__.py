"""What an attention's mask means: read from the program that makes it."""
