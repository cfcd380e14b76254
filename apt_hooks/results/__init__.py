"""What came of a run: its log read again, reports, comparisons, a scale that fits."""
