"""Sets of preferences made from public sources: what each stage keeps, and why."""
