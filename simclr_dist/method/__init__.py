"""SimCLR on plain arguments, over all ranks."""
