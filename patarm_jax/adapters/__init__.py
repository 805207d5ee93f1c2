"""A judge as the reward of TRL, verl, OpenRLHF and Tunix. Behind an endpoint it needs neither JAX nor a model."""
