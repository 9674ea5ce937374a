"""Write and read the product: encoders, published ones, ONNX."""
