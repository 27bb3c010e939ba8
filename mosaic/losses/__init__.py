"""The loss of a language model without its logits: ``mosaic::token_losses``."""
