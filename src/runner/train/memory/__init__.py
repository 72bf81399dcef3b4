"""Memory of a training: estimate, measure, tune the allocator."""
