"""What batch normalization costs: times, memory, and programs compiled for TPU and GPU."""
