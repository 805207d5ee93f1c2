"""From prompts to judgements: the sampler and judge()."""
