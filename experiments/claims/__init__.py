"""The claims made for batch normalization, one file each, with its measurement and its threshold."""
