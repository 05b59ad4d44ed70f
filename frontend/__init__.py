"""The Python side of Treadle: tensors, tracing, gradients, compiling, training.

From the bottom up: `tree`, `eager` (what runs at once), `tensor`, `dispatch` (how a call becomes a node),
`functions_*` (the NumPy-like namespace), `trace`, `control`, `transforms` (gradients), `random`, then what joins
everything: `compile`, `train`, `checkpoint`, `plugins`; `nn`, `optim`, `data` and `cli` stand on these.
"""
