"""The product: encoders out and in, published ones, ONNX."""
