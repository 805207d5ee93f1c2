"""One file for each benchmark: its rows, domains, layout of scores, official files and published rows."""
