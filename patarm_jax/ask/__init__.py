"""Who answers a question, the judge here or one behind an endpoint, and the answers that are kept."""
