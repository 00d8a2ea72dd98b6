"""What scoring costs, in units of one forward pass: every engine of ours, and the peers, on the same rows in one run."""
