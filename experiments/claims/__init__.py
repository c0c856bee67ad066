"""The claims made for batch normalization, one file each: what is measured, and what it is judged by."""
