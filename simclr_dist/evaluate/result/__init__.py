"""Keep and show a result: JSON, page, table, TensorBoard."""
