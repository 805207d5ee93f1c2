"""From files to records to batches of token ids."""
