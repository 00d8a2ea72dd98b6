"""A causal LM: load it, place it, walk it, and read its logits."""
