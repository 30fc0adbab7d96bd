"""What a run tells while it works: metric files, rates, utilisation and the status line."""
