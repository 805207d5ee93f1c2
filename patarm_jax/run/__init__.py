"""What every run has, whatever it trains: processes, folder, checkpoints, metrics, progress, export."""
