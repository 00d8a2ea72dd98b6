"""Measurements that print figures, never tests that pass or fail."""
