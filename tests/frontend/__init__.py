"""The frontend: tensors, tracing, gradients, compiling, training."""
