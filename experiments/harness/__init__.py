"""What every experiment needs: data, training, files, verdicts, figures, the report."""
