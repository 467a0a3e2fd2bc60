"""What writes the documentation's tables and pictures."""
