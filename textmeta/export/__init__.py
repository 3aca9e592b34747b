"""ONNX: a task and its encoder as one graph that runs without PyTorch."""
