"""The cost of batch normalization: times, memory, and programs compiled for TPU and GPU."""
