"""Plain, differentiable PyTorch for every op: its meaning, the test oracle, the path for devices without a kernel."""
