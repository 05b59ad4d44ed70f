"""The main job on real input: a small CNN learns handwritten digits, compiled, and its export runs elsewhere."""
