"""The whole truth about a command: sections, the config of each verb, and how they are read."""
