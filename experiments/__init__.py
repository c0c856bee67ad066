"""Claims made for batch normalization, each as an experiment with a number: `python -m experiments NAME`."""
