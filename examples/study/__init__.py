"""Parts of `compare_heads.py`: options, single runs, results, claims and report."""
