"""What a config will need: memory, time, bytes on the wire, disk; `report.py` is the page."""
