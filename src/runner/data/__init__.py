"""Data: rows from files or the Hub, made into token sequences, packed into batches."""
