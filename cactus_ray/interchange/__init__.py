"""The deployed file: written, read back and run with onnxruntime."""
