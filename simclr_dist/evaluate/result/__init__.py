"""The result of an evaluation: JSON, page, table, TensorBoard."""
