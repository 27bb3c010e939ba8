"""What an attention's mask means, read from the program that makes it; and attentions that are
written out: ``softmax(q @ k.T * scale + mask) @ v``."""
