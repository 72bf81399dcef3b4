"""Training memory: estimate, measure, tune the allocator."""
