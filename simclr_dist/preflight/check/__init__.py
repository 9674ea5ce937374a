"""Check what training needs of these machines. Read `checks.py` first."""
