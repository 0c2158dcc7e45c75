"""What makes a prepared set; each module runs as `python -m sources.NAME`."""
