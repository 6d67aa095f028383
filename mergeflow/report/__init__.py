"""What the user sees: progress while it runs, a summary and a manifest afterwards."""
