"""What the operating system is asked, and what people are told."""
