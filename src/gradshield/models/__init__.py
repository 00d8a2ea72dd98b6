"""A causal LM: load it, place it, walk it, read its logits, and let it answer greedily."""
