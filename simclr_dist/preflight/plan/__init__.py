"""Predict memory, time, network and disk. Read `report.py` first."""
