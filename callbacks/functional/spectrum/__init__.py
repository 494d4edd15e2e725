"""What a sharpness analysis found: the result, its tables and its figures."""
