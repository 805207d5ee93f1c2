"""What a judge reads and writes: rubrics, prompts, parser. Strings only."""
