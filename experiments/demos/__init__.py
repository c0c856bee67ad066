"""What is not a claim but worth seeing."""
