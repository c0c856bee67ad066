"""Code shared by the experiments: data, training, files, verdicts, figures, and the report."""
