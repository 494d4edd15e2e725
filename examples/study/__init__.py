"""Parts of `compare_heads.py`: options, one run, the results, the report."""
