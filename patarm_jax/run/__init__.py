"""What every run has, whatever it trains: here its processes."""
