"""What a run is: reads, edits, receipts, gradients."""
